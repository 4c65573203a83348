"""In which form the output moment ``G = Σ g gᵀ`` of a linear is kept.

A whole G takes out² numbers (18944² floats for one matrix of Qwen2.5-VL-7B). What may be kept in its place is a plain
sum as well, so that every form streams, resumes and adds up.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from spectrim.errors import RecipeError
from spectrim.linear import Linear


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


def choose_forms(linears: Sequence[Linear], wanted: Mapping[str, str]) -> dict[str, CurvatureForm]:
    """The form of every linear, by name: that of its role in `wanted`, such as ``{"gate": "sketch:512"}``, else full.

    Raises:
        RecipeError: `wanted` names no role of the model or no form, or blocks that do not divide the outputs.
    """
    fixed = {role: CurvatureForm.read(text) for role, text in wanted.items()}
    if strange := sorted(fixed.keys() - {linear.role for linear in linears}):
        raise RecipeError(f"the model has no linear of role '{strange[0]}'; spectrim anatomy lists its roles")
    forms = {linear.name: fixed.get(linear.role, CurvatureForm("full")) for linear in linears}
    for linear in linears:
        form = forms[linear.name]
        if form.kind == "blocks" and linear.out_features % form.size:
            raise RecipeError(f"blocks of {form.size} do not divide the {linear.out_features} outputs of {linear.name}")
    return forms
