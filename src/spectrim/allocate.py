"""From spectra and a byte budget to a plan: which linear keeps how many directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
import torch

from spectrim.anatomy import Linear
from spectrim.errors import BudgetError
from spectrim.recipe import AllocationPart


@dataclass(frozen=True)
class Choice:
    """The options of one linear: `least` directions, one more at `step` bytes each, and its dense weight.

    Directions are bought one by one up to `jump` of them; the next purchase is the dense weight. What is left at the
    end may still buy single directions beyond, as long as they cost less than the dense weight.
    """

    step: int  # bytes of one direction
    dense: int  # bytes of the dense weight
    scores: np.ndarray  # [jump + 1], non-increasing: how much each purchase is wanted, the dense weight last
    beyond: np.ndarray = field(default_factory=lambda: np.empty(0))  # scores of single directions past `jump`
    least: int = 1

    @property
    def jump(self) -> int:
        """Number of single directions before the dense weight."""
        return len(self.scores) - 1

    def prices(self) -> np.ndarray:
        """Bytes of each purchase, int64 [jump + 1]."""
        return np.array([self.step] * self.jump + [self.dense - self.jump * self.step])


def choice(part: AllocationPart, linear: Linear, s: torch.Tensor, loss: torch.Tensor | None, heads: int = 1) -> Choice:
    """The options of one linear under an allocation rule; its scores are comparable across linears.

    Rules: ``uniform``: minus the retention that the linear has with a direction, so that all grow alike.
    ``global-sigma``: the raw singular value √s_i (JW-SVD, section 4.2, as written). ``global-energy``: s_i / Σs per
    byte. ``sensitivity``: `s` itself, which then holds the measured losses. ``loss-aware``: predicted loss per byte
    (LASER); since the dense weight costs less than all directions, it is bought after the rank from which the way to it
    takes away more loss per byte than the next direction: the lower hull of loss over bytes.

    Args:
        s: [m] what the rule compares, by direction.
        loss: [m] predicted losses in nats; only ``loss-aware`` reads them.
        heads: parts that are factored apart, each with one direction at least.
    """
    step = (linear.out_features // heads + linear.in_features) * linear.dtype.itemsize
    values = (s if loss is None or part.rule != "loss-aware" else loss).double().numpy()
    steps = min(-(-linear.nbytes // step), len(values))  # from here on the dense weight costs no more
    if part.rule == "loss-aware":
        return _hull(values, step, linear.nbytes, steps, heads)
    if part.rule == "global-sigma":
        values = np.sqrt(values)
    elif part.rule == "global-energy":
        values = values / (values.sum() or 1.0) / step
    elif part.rule == "uniform":
        values = -np.arange(1, len(values) + 1) * (step / linear.nbytes)
    values = values[:steps].copy()
    values[heads:] = np.minimum.accumulate(values[heads:])  # by head, directions are in the order of their losses
    return Choice(step, linear.nbytes, values, least=heads)


def _hull(loss: np.ndarray, step: int, dense: int, steps: int, least: int) -> Choice:
    """The lower hull of predicted loss over bytes: single directions, then all the rest at once by the dense weight."""
    counts = np.arange(steps)
    left = loss[::-1].cumsum()[::-1][:steps]  # what the dense weight takes away after `counts` directions
    slopes = left / (dense - counts * step)
    reached = (loss[:steps] / step <= slopes) & (counts >= least)
    jump = int(reached.argmax()) if reached.any() else steps - 1
    return Choice(
        step, dense, np.append(loss[:jump] / step, slopes[jump]), beyond=loss[jump : steps - 1] / step, least=least
    )


def spend(choices: Mapping[str, Choice], budget: int) -> dict[str, int | None]:
    """Buy in the order of the scores until the budget is spent; number of directions by name, None for dense.

    Every linear gets its least first. The walk ends at the first purchase that the budget cannot pay; what is left then
    goes to the next ones that fit, each linear's in order, so that less than one step of any linear stays unspent.

    Raises:
        BudgetError: the least of all linears is already too much.
    """
    names, options = list(choices), list(choices.values())
    least = sum(int(option.prices()[: option.least].sum()) for option in options)
    if least > budget:
        raise BudgetError(
            f"the budget of {budget} bytes is less than the {least} bytes of rank 1 everywhere; raise --retain"
        )
    first = [np.where(np.arange(len(o.scores)) < o.least, np.inf, o.scores) for o in options]
    price = np.concatenate([option.prices() for option in options])
    owner = np.repeat(np.arange(len(options)), [len(option.scores) for option in options])
    order = np.argsort(-np.concatenate(first), kind="stable")
    taken = int(np.searchsorted(np.cumsum(price[order]), budget, side="right"))
    bought = np.bincount(owner[order[:taken]], minlength=len(names))
    left = budget - int(price[order[:taken]].sum())
    dense = bought > [option.jump for option in options]
    _fill(options, bought, dense, left)
    return {name: None if dense[i] else int(bought[i]) for i, name in enumerate(names)}


def _fill(options: Sequence[Choice], bought: np.ndarray, dense: np.ndarray, left: int) -> None:
    """Spend what is left on the purchases that fit, best first; changes `bought` and `dense`."""
    waiting: list[tuple[float, int, int, bool]] = []  # minus the score, linear, price, is it the dense weight?

    def offer(number: int) -> None:
        option, count = options[number], int(bought[number])
        rest = option.dense - count * option.step
        if count >= option.jump and rest <= left:
            heappush(waiting, (-float(option.scores[-1]), number, rest, True))
        elif count < option.jump + len(option.beyond) and option.step <= left:
            single = option.scores[count] if count < option.jump else option.beyond[count - option.jump]
            heappush(waiting, (-float(single), number, option.step, False))

    for number in np.flatnonzero(~dense).tolist():
        offer(number)
    while waiting:
        _, number, price, whole = heappop(waiting)
        if price <= left:
            left -= price
            dense[number] = whole
            bought[number] += not whole
        if not dense[number]:
            offer(number)
