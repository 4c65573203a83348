"""Two factors in the dtype of the model: of the whole matrix, with or without pivots, or head by head."""

from typing import Any

import numpy as np
import torch
from torch import nn

from spectrim.errors import ModelError
from spectrim.linear import Linear
from spectrim.maths.alternating import alternate
from spectrim.maths.decompose import Directions, Rank, factors, head_ranks
from spectrim.maths.roots import check_finite
from spectrim.recipe import QuantizePart
from spectrim.storage.base import Form, Options, Spec, Tensors, register
from spectrim.storage.integers import checked_grid
from spectrim.storage.layers import LowRankLinear
from spectrim.storage.problem import Problem

PIVOT = torch.int32.itemsize  # bytes of one pivot


class LowRank(Form):
    """``rank`` is one number, or one for each head; ``pivoted`` says that rows of the weight stand for the rest.

    Forms with integers in factors, or beside them, have ``grids`` besides, by the name of the part: A, A.0, B, R.
    """

    name = "low-rank"
    marker = "B.weight"
    alternates = True
    made_of: tuple[frozenset[str], ...] = (frozenset(),)  # the parts that `make` can round; a file may have others

    def options(self, problem: Problem) -> Options:
        """Every rank, or every multiple of the recipe's, at which the factors are smaller than the weight."""
        if problem.fixed_bits or problem.quantize.plain:
            return Options.listed(self.name, [])
        if problem.spectrum.heads > 1 and problem.storage.heads != "free":
            return self._by_blocks(problem)
        linear, heads, most = problem.linear, problem.spectrum.heads, len(problem.left) - 1
        step = problem.storage.multiple if heads == 1 else 1
        counts = np.arange(step if heads == 1 else heads, most + 1, step)
        sizes = factor_bytes(linear, counts, heads)
        pivoted = np.zeros(len(counts), bool)
        if problem.storage.pivoted and heads == 1:
            by_pivots = factor_bytes(linear, counts, pivoted=True)
            pivoted = (by_pivots < sizes) & (counts < linear.out_features)
            sizes = np.where(pivoted, by_pivots, sizes)
        smaller = sizes < linear.nbytes
        counts, pivoted = counts[smaller], pivoted[smaller]
        spectrum = problem.spectrum  # alone: options are kept, and the problem's metrics are large

        def spec(number: int) -> Spec:
            rank = spectrum.rank(int(counts[number]))
            return {"rank": rank if isinstance(rank, int) else list(rank), "pivoted": bool(pivoted[number])}

        return Options(self.name, sizes[smaller], problem.left[counts], spec)

    def _by_blocks(self, problem: Problem) -> Options:
        """Ranks by head in steps of the recipe's multiple: of the head that gains most, or of all heads together."""
        ranks, errors = _steps(problem.spectrum, problem.storage.multiple, problem.storage.heads == "equal")
        sizes = factor_bytes(problem.linear, ranks.sum(1), ranks.shape[1])
        kept = np.flatnonzero(sizes < problem.linear.nbytes)

        def spec(number: int) -> Spec:
            return {"rank": ranks[kept[number]].tolist(), "pivoted": False}

        return Options(self.name, sizes[kept], errors[kept], spec)

    def make(self, problem: Problem, spec: Spec) -> Tensors:
        """The factors of least error, values split evenly between them."""
        return self._stored(problem, spec, *_factors(problem, spec))

    def alternate(
        self, problem: Problem, spec: Spec, second: torch.Tensor, cross: torch.Tensor, rounds: int, formed: torch.dtype
    ) -> Tensors:
        """The factors of `make` fitted in turn to the targets, head by head where the rank is."""
        A, B = _factors(problem, spec)
        ranks = head_ranks(rank_of(spec))
        blocks = [rows.split(ranks, dim=1)[head] for head, rows in enumerate(A.chunk(len(ranks)))]
        roots = (None,) * len(ranks) if problem.output is None else problem.output.roots
        parts = zip(blocks, B.split(ranks), cross.chunk(len(ranks)), roots, strict=True)
        fitted = [alternate(a, b, second, t, rounds=rounds, formed=formed, output=root) for a, b, t, root in parts]
        return self._stored(problem, spec, torch.block_diag(*(a for a, _ in fitted)), torch.cat([b for _, b in fitted]))

    def _stored(self, problem: Problem, spec: Spec, A: torch.Tensor, B: torch.Tensor) -> Tensors:
        """The stored tensors of factors A [out, k] and B [k, in]."""
        for name, factor in (("A", A), ("B", B)):
            check_finite(f"its factor {name}", factor)
        layer = self.build(problem.empty(), spec)
        layer.load_factors(A, B)
        return layer.state_dict()

    def build(self, linear: nn.Linear, spec: Spec) -> LowRankLinear:
        """An empty LowRankLinear, with packed parts where the spec has grids."""
        if strange := sorted(spec.keys() - {"rank", "pivoted", "grids"}):
            raise ModelError(f"a layer of the form '{self.name}' has no {strange[0]!r}; take it out")
        rank, pivoted, grids = rank_of(spec), spec.get("pivoted", False), spec.get("grids", {})
        if type(pivoted) is not bool or not isinstance(grids, dict):
            raise ModelError(f"pivoted is true or false and grids are an object, not {pivoted!r} and {grids!r}")
        size, out = linear.in_features, linear.out_features
        ranks = head_ranks(rank)
        if out % len(ranks) == 0 and max(ranks) > (most := min(size, out // len(ranks))):
            whose = "a head of it" if len(ranks) > 1 else "it"
            raise ModelError(f"the rank {max(ranks)} is too large: {whose} can have {most} at most")
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        layer = LowRankLinear(size, out, rank, bias=False, pivoted=pivoted, **like)
        for part, values in grids.items():
            grid = checked_grid(values)
            if grid.rotated and part.startswith("A"):
                raise ModelError(f"{part} reads what B gives, which is not rotated; take the rotation out")
            layer.pack(part, grid)
        if layer.form != self.name:
            raise ModelError(f"parts {', '.join(grids) or 'without grids'} make the form '{layer.form}'; name that one")
        layer.requires_grad_(linear.weight.requires_grad).bias = linear.bias
        return layer.train(linear.training)

    def heads(self, spec: Spec) -> int:
        """As many as there are ranks."""
        return len(head_ranks(rank_of(spec)))

    def check(self, linear: Linear, spec: Spec) -> None:
        """As every form does; ranks by head are for q, k and v of known heads alone, grids for what `make` rounds."""
        rank = rank_of(spec)
        if not isinstance(rank, int) and not linear.per_head:
            raise ModelError("ranks by head are for q, k and v projections of known heads; give it one rank")
        if not isinstance(rank, int) and len(rank) != linear.per_head:
            raise ModelError(f"there are ranks for {len(rank)} heads and it has {linear.per_head}; give each one")
        super().check(linear, spec)
        if (parts := spec.get("grids", {}).keys()) not in self.made_of:
            choices = " or ".join(", ".join(sorted(choice)) or "no part" for choice in self.made_of)
            raise ModelError(f"it has grids for {', '.join(parts)}, where they can be made for {choices} alone")
        if parts and not isinstance(rank, int):
            raise ModelError("integers are made with one rank, not with ranks by head; give it one")

    def least(self, linear: Linear, quantize: QuantizePart) -> int:
        """Bytes of one direction, where factors may be floats."""
        if quantize.plain:
            return linear.nbytes
        return int(factor_bytes(linear, 1)) if quantize.bits in (None, "auto") else 0

    def nbytes(self, linear: Linear, spec: Spec) -> int:
        """Bytes of factors and pivots, and of what grids store."""
        rank, grids, itemsize = rank_of(spec), spec.get("grids", {}), linear.dtype.itemsize
        ranks, out, size = head_ranks(rank), linear.out_features, linear.in_features
        if not grids:
            return int(factor_bytes(linear, sum(ranks), len(ranks), spec.get("pivoted", False)))
        heads = {"A" if isinstance(rank, int) else f"A.{h}": (out // len(ranks), k) for h, k in enumerate(ranks)}
        parts = heads | {"B": (sum(ranks), size)} | ({"R": (out, size)} if "R" in grids else {})
        packed = {part: checked_grid(grids[part]).nbytes(*parts[part], itemsize) for part in grids if part in parts}
        return sum(packed.get(part, rows * columns * itemsize) for part, (rows, columns) in parts.items())

    def params(self, linear: Linear, spec: Spec) -> int:
        """Numbers in both factors, and in the weight beside them."""
        ranks = head_ranks(rank_of(spec))
        beside = linear.params if "R" in spec.get("grids", {}) else 0
        return beside + int(_factor_params(linear, sum(ranks), len(ranks), spec.get("pivoted", False)))


def _steps(spectrum: Directions, multiple: int, equal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ranks by head, int64 [n, heads], that grow by `multiple` directions, and the errors that they leave [n]."""
    each = spectrum.s if spectrum.loss is None else spectrum.loss
    assert spectrum.head is not None
    costs = torch.stack([each[spectrum.head == number] for number in range(spectrum.heads)]).cpu().numpy()  # [heads, d]
    heads, blocks = len(costs), costs.shape[1] // multiple
    gains = costs[:, : blocks * multiple].reshape(heads, blocks, multiple).sum(2)
    if equal:
        ranks = multiple * np.arange(1, blocks + 1)[:, None].repeat(heads, axis=1)
        return ranks, np.maximum(costs.sum() - gains.sum(0).cumsum(), 0.0)
    urgent = gains.copy()
    urgent[:, :1] = np.inf  # the first block of each head comes before all others
    order = (-urgent).ravel().argsort(kind="stable")
    ranks = multiple * np.eye(heads, dtype=np.int64)[order // max(1, blocks)].cumsum(0)
    errors = np.maximum(costs.sum() - gains.ravel()[order].cumsum(), 0.0)
    return ranks[heads - 1 :], errors[heads - 1 :]


def _factors(problem: Problem, spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """A [out, k] and B [k, in] of least error, in the dtype of the directions."""
    return factors(problem.W, *problem.spectrum.directions(rank_of(spec), problem.W.device))


def rank_of(spec: Spec) -> Rank:
    """The rank of a spec: of the whole, or by head. Raises ModelError for what is none."""
    rank = spec.get("rank")
    each = tuple(rank) if isinstance(rank, list | tuple) else (rank,)
    if not each or any(type(k) is not int or k < 1 for k in each):
        raise ModelError(f"the rank {rank!r} is impossible: ranks are whole numbers of at least 1")
    return each[0] if isinstance(rank, int) else each


def _factor_params(linear: Linear, count: Any, heads: int = 1, pivoted: bool = False) -> Any:
    """Numbers in the factors of one linear with `count` directions in all, one count or an array of them.

    A direction pays for all inputs and for the outputs of its own head. Pivots spare a square of `count` numbers.
    """
    return count * (linear.in_features + linear.out_features // heads - pivoted * count)


def factor_bytes(linear: Linear, count: Any, heads: int = 1, pivoted: bool = False) -> Any:
    """Bytes of the same, with those of the pivots."""
    return _factor_params(linear, count, heads, pivoted) * linear.dtype.itemsize + pivoted * PIVOT * count


register(LowRank())
