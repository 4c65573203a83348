"""Two factors in integers (docs/methods.md, section 8)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from spectrim.linear import Linear
from spectrim.maths.closed_form import gram, refit
from spectrim.maths.decompose import sides
from spectrim.maths.roots import times_metric
from spectrim.maths.rounding import Quantized, error
from spectrim.recipe import QuantizePart
from spectrim.storage.base import Options, Spec, Tensors, register
from spectrim.storage.integers import allowed_bits, rounded
from spectrim.storage.low_rank import LowRank, rank_of
from spectrim.storage.problem import Problem

RANKS = 32  # ranks that are options are multiples of this, or of `storage.multiple` above it


class IntegerFactors(LowRank):
    """``rank``, and ``grids`` of A and B."""

    name = "integer-factors"
    marker = "B.weight_packed"
    searches = True
    alternates = False
    made_of: tuple[frozenset[str], ...] = (frozenset("AB"),)

    def options(self, problem: Problem) -> Options:
        """Some ranks for each number of bits that the recipe allows; none where factors are by head."""
        rows: list[tuple[int, float, Spec]] = []
        if problem.heads > 1 or problem.quantize.plain or not allowed_bits(problem):
            return Options.listed(self.name, rows)
        directions = problem.spectrum.directions(len(problem.left) - 1, problem.W.device)
        A, B = (part.double() for part in sides(problem.W.double(), *directions[1:]))
        energy = (times_metric(B, problem.C) * B).sum(1)  # of B C Bᵀ, which is diagonal
        gain = (times_metric(A.T, problem.G) * A.T).sum(1)  # of AᵀGA, likewise
        for bits in allowed_bits(problem):
            noise_A = problem.noise(A, problem.grid(bits, A.shape[1], rotated=False), inputs=energy).sum(0)
            noise_B = problem.noise(B, problem.grid(bits, B.shape[1]), outputs=gain).sum(1)
            added = (noise_A + noise_B).cumsum(0).tolist()
            for count in ranks(problem):
                spec = self.spec(problem, count, bits)
                size = self.nbytes(problem.linear, spec)
                rows.append((size, float(problem.left[count]) + added[count - 1], spec))
        return Options.listed(self.name, rows)

    def least(self, linear: Linear, quantize: QuantizePart) -> int:
        """Bytes of the weight where the recipe has no integers."""
        return linear.nbytes if quantize.bits is None or quantize.plain else 0

    def spec(self, problem: Problem, count: int, bits: int) -> dict[str, Any]:
        """Factors of this rank and these bits."""
        A, B = problem.grid(bits, count, rotated=False), problem.grid(bits, problem.linear.in_features)
        return {"rank": count, "grids": {"A": A.spec, "B": B.spec}}

    def make(self, problem: Problem, spec: Spec) -> Tensors:
        """B rounded, then A, with the directions of the problem."""
        layer: Any = self.build(problem.empty(), spec)
        directions = problem.spectrum.directions(rank_of(spec), problem.W.device)
        load_rounded(problem, layer, problem.W.double(), directions)
        return layer.state_dict()


def load_rounded(problem: Problem, layer: Any, W: torch.Tensor, directions: Sequence[Any]) -> None:
    """Fill the packed factors of a layer so that their product is near W [out, in] float64.

    The re-fit of A makes up for the rounding of B; under a steep metric its columns may be too unlike for one scale, so
    the better of both is taken. Scales of float16 have too few exponents before `_balanced`; bfloat16 holds as many of
    their digits.
    """
    C, G = problem.C, problem.G
    narrow = torch.bfloat16 if problem.linear.dtype == torch.float16 else problem.linear.dtype
    A, factor = (part.double() for part in sides(W, *directions[1:]))
    rounded_B = rounded(problem, factor, layer.B.grid, C, None, narrow)
    B = rounded_B.dense()
    if not problem.quantize.fed:
        rounded_A = rounded(problem, A, layer.A.grid, None, None, narrow)
    else:
        tried = [rounded(problem, X, layer.A.grid, gram(B, C), G, narrow) for X in (A, refit(W, A, B, C))]
        rounded_A = min(tried, key=lambda quantized: error(W - quantized.dense() @ B, C, G))
    rounded_A, rounded_B = _balanced(rounded_A, rounded_B, problem.linear.dtype)
    layer.A.load(rounded_A)
    layer.B.load(rounded_B)


def _balanced(A: Quantized, B: Quantized, dtype: torch.dtype) -> tuple[Quantized, Quantized]:
    """The same product, with powers of two moved between the scales of A and B so that both are of one size.

    They are exchanged by the columns of A [out, k] that share their scales. Nothing is lost, and scales in `dtype` are
    then normal numbers in float16, too.
    """
    above, below = (_live(factor) for factor in (A, B))  # [out, groups], [k, groups of B]
    of_rows = below.unflatten(0, (above.shape[1], -1)).flatten(1)  # [groups, all scales of their rows]
    power = balance(above.T.abs(), of_rows.abs())  # [groups]
    rows = power.repeat_interleave(len(below) // len(power))
    scales = (above / power).nan_to_num(1.0), (below * rows[:, None]).nan_to_num(1.0)
    return replace(A, scale=scales[0].to(dtype)), replace(B, scale=scales[1].to(dtype))


def _live(quantized: Quantized) -> torch.Tensor:
    """Scales, float64; NaN where all codes of a group stand for zero, so that the scale is any."""
    zero = torch.zeros_like(quantized.scale, dtype=torch.int8) if quantized.zero is None else quantized.zero
    used = (quantized.codes.unflatten(1, (quantized.scale.shape[1], -1)) != zero[..., None]).any(-1)
    return quantized.scale.double().where(used, torch.nan)


def balance(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Powers of two [n] by which to divide rows of `above` [n, …] and to multiply those of `below` [n, …].

    The least numbers of both are then of one size: what small factors of float16 lose is at that end.
    """
    least = [x.nan_to_num(torch.inf).amin(1).log2() for x in (above, below)]
    return ((least[0] - least[1]) / 2).nan_to_num(0.0, 0.0, 0.0).round().exp2()


def ranks(problem: Problem) -> range:
    """The ranks that are options: fewer than for floats, since each has to be priced."""
    most, multiple = len(problem.left) - 1, problem.storage.multiple
    step = RANKS if most >= 4 * RANKS else 8 if most >= RANKS else 1
    step = -(-step // multiple) * multiple
    return range(step, most + 1, step)


register(IntegerFactors())
