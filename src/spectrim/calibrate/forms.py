"""In which form the output moment ``G = Σ g gᵀ`` of a linear is kept, so that all of them fit a memory limit.

A whole G takes out² numbers, which the widest layers of large models cannot have (18944² floats for one matrix of
Qwen2.5-VL-7B). What is kept instead is a plain sum as well, so that every form streams, resumes and adds up.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from spectrim.errors import ModelError, RecipeError
from spectrim.linear import Linear

SKETCH = 256  # rank of the sketch that the ladder uses


@dataclass(frozen=True)
class CurvatureForm:
    """``full`` [out, out]; ``blocks`` of `size` outputs [out/size, size, size]; ``sketch``, low-rank plus diagonal
    [out, size] and [out]; ``diagonal`` [out]."""

    kind: Literal["full", "blocks", "sketch", "diagonal"]
    size: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.size}" if self.size else self.kind

    @classmethod
    def read(cls, text: str) -> "CurvatureForm":
        """The form that a text such as ``full``, ``blocks:64``, ``sketch:256`` or ``diagonal`` names.

        Raises:
            RecipeError: it names none.
        """
        if match := re.fullmatch(r"(full|diagonal)|(blocks|sketch):([1-9]\d*)", text):
            return cls(match[1] or match[2], int(match[3] or 0))  # type: ignore[arg-type]
        raise RecipeError(f"'{text}' is no form of an output moment; write full, blocks:64, sketch:256 or diagonal")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the sums."""
        return {"sketch": ("output", "output_diagonal"), "diagonal": ("output_diagonal",)}.get(self.kind, ("output",))

    def shapes(self, out: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the sums that a linear of `out` outputs keeps, by name."""
        if self.kind == "full":
            return {"output": (out, out)}
        if self.kind == "blocks":
            return {"output": (out // self.size, self.size, self.size)}
        if self.kind == "sketch":
            return {"output": (out, self.size), "output_diagonal": (out,)}
        return {"output_diagonal": (out,)}

    def nbytes(self, out: int) -> int:
        """Bytes of those sums, in float64."""
        return sum(8 * torch.Size(shape).numel() for shape in self.shapes(out).values())


def _ladder(linear: Linear) -> list[CurvatureForm]:
    """Forms from exact to cheap; each takes less memory than the one before."""
    out = linear.out_features
    rungs = [CurvatureForm("full")]
    if linear.per_head:
        rungs.append(CurvatureForm("blocks", out // linear.per_head))
    elif out > 2 * SKETCH:
        rungs.append(CurvatureForm("sketch", SKETCH))
    return [*rungs, CurvatureForm("diagonal")]


def choose_forms(
    linears: Sequence[Linear], limit: int, passes: int = 1, wanted: Mapping[str, str] | None = None
) -> tuple[dict[str, CurvatureForm], list[list[Linear]]]:
    """A form for every linear, and the groups of linears that are gathered together, one group to a pass.

    Everything is full where that fits into `passes` groups of at most `limit` bytes each. Otherwise the linears whose
    sums are largest go down one rung together (q, k, v to blocks by head, wide others to low-rank plus diagonal, then
    to the diagonal), until all fits. `wanted` sets the form of a role beforehand: ``{"gate": "sketch:512"}``.

    Raises:
        RecipeError: `wanted` names no role of the model or no form, or blocks that do not divide the outputs.
        ModelError: the diagonals alone are too much.
    """
    fixed = {role: CurvatureForm.read(text) for role, text in (wanted or {}).items()}
    if strange := sorted(fixed.keys() - {linear.role for linear in linears}):
        raise RecipeError(f"the model has no linear of role '{strange[0]}'; spectrim anatomy lists its roles")
    rungs = {linear.name: [fixed[linear.role]] if linear.role in fixed else _ladder(linear) for linear in linears}
    for linear in linears:
        form = rungs[linear.name][0]
        if form.kind == "blocks" and linear.out_features % form.size:
            raise RecipeError(f"blocks of {form.size} do not divide the {linear.out_features} outputs of {linear.name}")

    def cost(linear: Linear) -> int:
        return rungs[linear.name][0].nbytes(linear.out_features)

    while True:
        groups = _groups(linears, cost, limit)
        if len(groups) <= passes and all(cost(linear) <= limit for linear in linears):
            return {linear.name: rungs[linear.name][0] for linear in linears}, groups
        open_ = [linear for linear in linears if len(rungs[linear.name]) > 1]
        if not open_:
            raise ModelError(
                f"the output moments take {sum(map(cost, linears))} bytes in their smallest form and {limit} are "
                f"allowed in each of {passes} passes; allow more memory or more passes"
            )
        largest = max(map(cost, open_))
        for linear in open_:
            if cost(linear) == largest:
                del rungs[linear.name][0]


def _groups(linears: Sequence[Linear], cost: Callable[[Linear], int], limit: int) -> list[list[Linear]]:
    """Neighbours together, a new group where the next linear no longer fits."""
    groups: list[list[Linear]] = []
    room = 0
    for linear in linears:
        if not groups or cost(linear) > room:
            groups.append([])
            room = limit
        groups[-1].append(linear)
        room -= cost(linear)
    return groups
