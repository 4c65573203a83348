"""The share of the compressed model's inputs in each fit, as samples choose it that no layer is fitted to."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from spectrim.compensate.batches import Rows
from spectrim.errors import NumericalError
from spectrim.maths.closed_form import LeftOut, best_weight, correction
from spectrim.maths.roots import wide
from spectrim.samples import Modality


@dataclass(frozen=True)
class Fit:
    """What one linear is fitted to: joint moments of the compressed model, and one of the dense model."""

    W: torch.Tensor  # [out, in]
    weights: dict[Modality, float]  # of the means of each modality
    second: torch.Tensor  # C' [in, in] float64
    cross: torch.Tensor  # T [out, in] float64
    moment: torch.Tensor  # the dense model's C [in, in]


def shares(fits: Mapping[str, Fit], rows: Iterator[Rows], damping: float) -> dict[str, float]:
    """By linear, the ω of least error over the rows of left-out samples (docs/methods.md, section 7).

    Raises:
        NumericalError: NaN or infinity, or inputs that are too ill-conditioned; names the linear.
    """
    judges: dict[str, dict[Modality, LeftOut]] = {}
    for name, fit in fits.items():
        with naming(name):
            step = correction(fit.W, fit.second, fit.cross, fit.moment, damping)
        step = step.to(wide(fit.W).dtype)  # linears of a group wait for each other
        judges[name] = {modality: LeftOut(fit.W, step) for modality in fit.weights}
    for modality, x, targets in rows:
        for name, by_modality in judges.items():
            if modality in by_modality:
                with naming(name):
                    by_modality[modality].add(x, targets[name])
    return {name: best_weight([(fits[name].weights[m], one) for m, one in by.items()]) for name, by in judges.items()}


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the linear of a NumericalError."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from error
