"""The options of a linear in all forms that the recipe allows, and the file that keeps those that took long to find."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from spectrim.disk.sealed import open_sealed, write_sealed
from spectrim.linear import Linear
from spectrim.storage import DENSE, Options, Problem, Spec, forms


@dataclass(frozen=True)
class Menu:
    """All options of one linear, form after form; none but the dense weight is as large as that.

    ``left`` [m + 1] is the error after 0, 1, … directions of its ``heads``, in the unit of the options' errors;
    ``pivoted`` says that float factors are stored by pivots where that is smaller.
    """

    linear: Linear
    parts: Sequence[Options]
    left: np.ndarray
    heads: int = 1
    pivoted: bool = False

    @cached_property
    def bytes(self) -> np.ndarray:
        """Bytes of each option, int64 [n]."""
        return np.concatenate([part.bytes for part in self.parts])

    @cached_property
    def error(self) -> np.ndarray:
        """Predicted error of each option, float64 [n]."""
        return np.concatenate([part.error for part in self.parts])

    def option(self, number: int) -> tuple[str, Spec]:
        """Form and spec of an option."""
        for part in self.parts:
            if number < len(part.bytes):
                return part.form, part.spec(number)
            number -= len(part.bytes)
        raise IndexError(number)


def menu(problem: Problem, kept: Path | None = None) -> Menu:
    """All options of a linear; those of forms that search long are read from the file `kept`, or written there.

    Raises StatisticsError where that file cannot be read or written.
    """
    searched, quick = ([form for form in forms() if form.searches is searches] for searches in (True, False))
    of = "" if kept is None else f"{kept.parent.name}/{problem.linear.name}"
    if kept is not None and kept.exists():
        file = open_sealed(kept, of=of)
        parts = [
            Options(name, file.tensor(f"{name}.bytes").numpy(), file.tensor(f"{name}.error").numpy(), specs.__getitem__)
            for name, specs in json.loads(file.note).items()
        ]
    else:
        parts = [part for form in searched if len((part := form.options(problem)).bytes)]
        if kept is not None and parts:
            tensors = {f"{part.form}.bytes": torch.from_numpy(part.bytes) for part in parts}
            tensors |= {f"{part.form}.error": torch.from_numpy(part.error) for part in parts}
            specs = {part.form: [part.spec(number) for number in range(len(part.bytes))] for part in parts}
            write_sealed(kept, tensors, of=of, note=json.dumps(specs))
    dense = problem.linear.nbytes
    found = [form.options(problem) for form in quick] + [_smaller(part, dense) for part in parts]
    if not any(len(part.bytes) for part in found):  # no integers are smaller than the weight
        found = [dense_alone(problem.linear)]
    heads = problem.spectrum.heads
    return Menu(problem.linear, found, problem.left, heads, problem.storage.pivoted and heads == 1)


def dense_alone(linear: Linear) -> Options:
    """The dense weight, where there is no other option."""
    return Options.listed(DENSE, [(linear.nbytes, 0.0, {})])


def _smaller(part: Options, dense: int) -> Options:
    """Those options that take fewer bytes than the dense weight."""
    kept = np.flatnonzero(part.bytes < dense)
    return replace(part, bytes=part.bytes[kept], error=part.error[kept], spec=lambda n: part.spec(int(kept[n])))
