"""From spectra and a byte budget to a plan: which linear keeps how many directions."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from spectrim.anatomy import Linear
from spectrim.errors import BudgetError
from spectrim.recipe import AllocationPart


@dataclass(frozen=True)
class Choice:
    """The options of one linear: ranks 1, 2, … at `step` bytes each until storing it dense costs no more."""

    step: int  # bytes of one rank: (out + in) elements
    dense: int  # bytes of the dense weight
    scores: np.ndarray  # [m], non-increasing: how much direction i is wanted, per byte

    @property
    def steps(self) -> int:
        """Number of purchases up to and including the dense weight; the last one may be cheaper than `step`."""
        return min(-(-self.dense // self.step), len(self.scores))

    def nbytes(self, bought: int) -> int:
        """Bytes after `bought` purchases."""
        return self.dense if bought == self.steps else bought * self.step


def scores(rule: str, s: torch.Tensor, linear: Linear) -> np.ndarray:
    """How much each direction of a linear is wanted; [m] float64, comparable across linears, non-increasing.

    ``uniform``: minus the retention that the linear has with it, so that all grow alike. ``global-sigma``: the raw
    singular value √s_i (JW-SVD, section 4.2, as written). ``global-energy``: s_i / Σs per parameter. ``sensitivity``:
    `s` itself, which then holds the measured losses.
    """
    values = s.numpy()
    size = linear.out_features + linear.in_features
    if rule == "global-sigma":
        return np.sqrt(values)
    if rule == "sensitivity":
        return values
    if rule == "global-energy":
        total = float(values.sum())
        return values / (total or 1.0) / size
    return -np.arange(1, len(values) + 1) * (size / linear.params)


def spend(choices: Mapping[str, Choice], budget: int) -> dict[str, int | None]:
    """Buy directions in the order of their scores until the budget is spent; rank by name, None for dense.

    Every linear gets rank 1 first. The walk ends at the first direction that the budget cannot pay; what is left then
    goes to the next ones that fit, each linear's in order, so that less than one step of any linear stays unspent.

    Raises:
        BudgetError: rank 1 everywhere is already too much.
    """
    names = list(choices)
    least = sum(choice.nbytes(1) for choice in choices.values())
    if least > budget:
        raise BudgetError(
            f"the budget of {budget} bytes is less than the {least} bytes of rank 1 everywhere; raise --retain"
        )
    prices, wanted, owners = [], [], []
    for number, choice in enumerate(choices.values()):
        total = [choice.nbytes(bought) for bought in range(choice.steps + 1)]
        prices.append(np.diff(total))
        wanted.append(np.concatenate([[np.inf], choice.scores[1 : choice.steps]]))
        owners.append(np.full(choice.steps, number))
    price, owner = np.concatenate(prices), np.concatenate(owners)
    order = np.argsort(-np.concatenate(wanted), kind="stable")
    taken = int(np.searchsorted(np.cumsum(price[order]), budget, side="right"))
    bought = np.bincount(owner[order[:taken]], minlength=len(names))
    left = budget - int(price[order[:taken]].sum())
    closed = np.zeros(len(names), dtype=bool)
    cheapest = int(price.min())
    for index in order[taken:]:
        if left < cheapest:
            break
        if closed[owner[index]]:
            continue
        if price[index] > left:
            closed[owner[index]] = True
            continue
        bought[owner[index]] += 1
        left -= int(price[index])
    return {
        name: None if count == choices[name].steps else int(count) for name, count in zip(names, bought, strict=True)
    }


def choice(part: AllocationPart, linear: Linear, s: torch.Tensor) -> Choice:
    """The options of one linear under an allocation rule, from its spectrum `s` [m]."""
    step = (linear.out_features + linear.in_features) * linear.dtype.itemsize
    return Choice(step, linear.nbytes, scores(part.rule, s, linear))
