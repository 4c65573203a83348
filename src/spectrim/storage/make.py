"""One linear as a checkpoint stores it: factors, integers, or both; made from a weight, its metrics and a row."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from spectrim.anatomy import Linear
from spectrim.errors import NumericalError
from spectrim.maths.decompose import OutputMetric, Rank, decompose, directions, factors, head_ranks, sides
from spectrim.maths.roots import check_finite, times_metric
from spectrim.maths.rounding import DAMPING, Grid, Quantized, error, quantize
from spectrim.plan.plan import PlanRow, counted
from spectrim.storage.layers import pack_linears, replace_linears

Directions = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Values [k] and directions P, Q, as :meth:`spectrim.metrics.spectra.Spectra.directions` gives them."""

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [out, k] and B [k, in] of one linear; k is the sum of ranks by head, A zero outside each head."""


@dataclass(frozen=True)
class Stored:
    """The parts of a linear by name: factors A [out, k] and B [k, in] and a weight R [out, in] that is added to their
    product, or the weight alone, under the name "". Each is a float tensor, or integers.
    """

    parts: Mapping[str, torch.Tensor | Quantized]

    def weight(self) -> torch.Tensor:
        """The weight [out, in] that the model computes with, float64."""
        found = {name: _wide(part) for name, part in self.parts.items()}
        if "" in found:
            return found[""]
        product = found["A"] @ found["B"]
        return product + found["R"] if "R" in found else product

    @property
    def factors(self) -> Factors | None:
        """A and B where both are floats."""
        A, B = self.parts.get("A"), self.parts.get("B")
        return (A, B) if isinstance(A, torch.Tensor) and isinstance(B, torch.Tensor) else None

    def put(self, model: nn.Module, name: str, rank: Rank | None, *, pivoted: bool = False) -> None:
        """Exchange the dense linear `name` of `model` for this."""
        if rank is not None:
            replace_linears(model, {name: rank}, {name} if pivoted else ())
            if self.factors is not None:
                layer: Any = model.get_submodule(name)
                layer.load_factors(*self.factors)
        integers = {part: found for part, found in self.parts.items() if isinstance(found, Quantized)}
        places = {part: f"{name}.{part}".removesuffix(".") for part in integers}
        pack_linears(model, {places[part]: found.grid for part, found in integers.items()})
        for part, found in integers.items():
            packed: Any = model.get_submodule(places[part])
            packed.load(found)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it as tensors, for a file; `from_tensors` is the inverse."""
        found = {}
        for name, part in self.parts.items():
            if isinstance(part, torch.Tensor):
                found[name] = part
                continue
            grid = part.grid
            found[f"{name}.grid"] = torch.tensor([grid.bits, grid.group or 0, int(grid.symmetric)])
            found |= {f"{name}.codes": part.codes, f"{name}.scale": part.scale}
            if part.zero is not None:
                found[f"{name}.zero"] = part.zero
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "Stored":
        """The linear that `tensors` made them of."""
        parts: dict[str, torch.Tensor | Quantized] = {}
        for key, tensor in tensors.items():
            name, _, what = key.partition(".")
            if what == "grid":
                bits, group, symmetric = tensor.tolist()
                grid = Grid(bits, group or None, bool(symmetric))
                codes, scale = (tensors[f"{name}.{kind}"] for kind in ("codes", "scale"))
                parts[name] = Quantized(grid, codes, scale, tensors.get(f"{name}.zero"))
            elif not what:
                parts[name] = tensor
        return cls(parts)


def make_stored(
    W: torch.Tensor,
    linear: Linear,
    row: PlanRow,
    C: torch.Tensor | None,
    output: OutputMetric | None,
    *,
    damping: float | None = DAMPING,
    found: Directions | None = None,
) -> Stored:
    """A weight as a row of the plan says, with a small error in the metrics.

    Args:
        W: [out, in], any floating dtype.
        linear: whose it is; scales are in its dtype, factors in that or in float32 if it is narrower.
        row: with a rank, integers, or both.
        C: metric of the inputs: None for the identity, [in] for a diagonal, or [in, in].
        output: metric of the outputs, head by head where the rank is; None for the identity.
        damping: of these metrics where rounding errors are fed on in them (see `quantize`);
            None rounds entries to nearest.
        found: directions of W in the same metrics, where they are known.

    Raises:
        NumericalError: NaN or infinity; names the linear.
    """
    try:
        parts = _parts(check_finite("its weight", W).double(), linear, row, C, output, damping, found)
    except NumericalError as wrong:
        raise NumericalError(f"{linear.name}: {wrong}") from wrong
    if row.integers is not None and row.rank is not None:
        parts = parts | _balanced(parts["A"], parts["B"], linear.dtype)
    return _finite(linear.name, parts)


def _parts(
    W: torch.Tensor,
    linear: Linear,
    row: PlanRow,
    C: torch.Tensor | None,
    output: OutputMetric | None,
    damping: float | None,
    found: Directions | None,
) -> dict[str, torch.Tensor | Quantized]:
    how, wide = row.integers, torch.promote_types(linear.dtype, torch.float32)
    parts: dict[str, torch.Tensor | Quantized] = {}
    if found is None and row.rank is not None and (how is None or how.residual is None):
        found = directions(decompose(W, C, output, len(head_ranks(row.rank))), row.rank)
    if how is None:
        assert found is not None
        A, B = factors(W, *found)
        return {"A": A.to(wide), "B": B.to(wide)}
    fed, grids = damping is not None, how.grids(linear, row.rank)
    G = None if output is None or not fed else output.dense(len(W), W.device)

    def integers(part: str, X: torch.Tensor, C: torch.Tensor | None, G: torch.Tensor | None) -> Quantized:
        given = (C, G) if fed else (None, None)
        # float16 has too few exponents for factors before `_balanced`; it holds the digits of bfloat16.
        narrow = torch.bfloat16 if linear.dtype == torch.float16 and part in ("A", "B") else linear.dtype
        parts[part] = rounded = quantize(X, grids[part][2], *given, dtype=narrow, damping=damping or 0.0)
        return rounded

    if row.rank is None:
        integers("", W, C, G)
        return parts
    if how.residual is not None:
        W = W - integers("R", W, C, G).dense()
        found = directions(decompose(W, C, output), counted(row.rank)[0])
    assert found is not None
    A, B = (factor.double() for factor in sides(W, *found[1:]))
    if how.bits is None:
        return parts | {"A": A.to(wide), "B": B.to(wide)}
    B = integers("B", B, C, None).dense()
    if not fed:
        integers("A", A, None, None)
        return parts
    # The re-fit makes up for the rounding of B; under a steep metric its columns may be too unlike for one scale.
    made = [integers("A", X, gram(B, C), G) for X in (A, refit(W, A, B, C))]
    parts["A"] = min(made, key=lambda rounded: error(W - rounded.dense() @ B, C, G))
    return parts


def _balanced(
    A: torch.Tensor | Quantized, B: torch.Tensor | Quantized, dtype: torch.dtype
) -> dict[str, torch.Tensor | Quantized]:
    """The same product, with powers of two moved between A and B so that numbers of both are of one size.

    Float columns of A [out, k] and rows of B [k, in] are exchanged one by one, integers by the columns of A that share
    their scales. Nothing is lost, and scales in `dtype` are then normal numbers in float16, too.
    """
    if isinstance(A, Quantized) and isinstance(B, Quantized):
        above, below = (_live(factor) for factor in (A, B))  # [out, groups], [k, groups of B]
        ranks = below.unflatten(0, (above.shape[1], -1)).flatten(1)  # [groups, all scales of their rows]
        power = _power(above.T, ranks)  # [groups]
        rows = power.repeat_interleave(len(below) // len(power))
        scales = {"A": (above / power).nan_to_num(1.0), "B": (below * rows[:, None]).nan_to_num(1.0)}
        return {part: replace(x, scale=scales[part].to(dtype)) for part, x in (("A", A), ("B", B))}
    if isinstance(A, torch.Tensor) and isinstance(B, torch.Tensor):
        sizes = (M.abs().amax(1, keepdim=True).double() for M in (A.T, B))
        power = _power(*(size.where(size > 0, torch.nan) for size in sizes)).to(A.dtype)  # [k]
        return {"A": A / power, "B": B * power[:, None]}
    return {"A": A, "B": B}


def _live(found: Quantized) -> torch.Tensor:
    """Scales, float64; NaN where all codes of a group stand for zero, so that the scale is any."""
    zero = torch.zeros_like(found.scale, dtype=torch.int8) if found.zero is None else found.zero
    used = (found.codes.unflatten(1, (found.scale.shape[1], -1)) != zero[..., None]).any(-1)
    return found.scale.double().where(used, torch.nan)


def _power(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Powers of two [n] by which to divide rows of `above` [n, …] and to multiply those of `below` [n, …].

    The least numbers of both are then of one size: what small factors of float16 lose is at that end.
    """
    least = [x.nan_to_num(torch.inf).amin(1).log2() for x in (above, below)]
    return ((least[0] - least[1]) / 2).nan_to_num(0.0, 0.0, 0.0).round().exp2()


def plain(name: str, A: torch.Tensor, B: torch.Tensor) -> Stored:
    """Factors as they are. Raises NumericalError where they are not finite; names the linear."""
    return _finite(name, {"A": A, "B": B})


def _finite(name: str, parts: Mapping[str, torch.Tensor | Quantized]) -> Stored:
    for part, found in parts.items():
        if isinstance(found, torch.Tensor):
            check_finite(f"the factor {part} of {name}", found)
    return Stored(parts)


def gram(B: torch.Tensor, C: torch.Tensor | None) -> torch.Tensor:
    """``B C Bᵀ`` [k, k] of B [k, in]: the metric of the inputs of the other factor."""
    return times_metric(B, C) @ B.T


def refit(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor | None = None) -> torch.Tensor:
    """The A [out, k] of least ``‖L (W − A B) R‖`` for a given B [k, in], whatever L is (adaComp, AdaSVD, section 3.2).

    ``A + (W − A B) C Bᵀ (B C Bᵀ)⁺``: in directions that the metric C of the inputs does not see, A stays what it is.
    """
    return A + times_metric(W - A @ B, C) @ B.T @ torch.linalg.pinv(gram(B, C), hermitian=True, rtol=1e-9)


def _wide(part: torch.Tensor | Quantized) -> torch.Tensor:
    return part.dense() if isinstance(part, Quantized) else part.double()
