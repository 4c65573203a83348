"""The allocator: a byte budget over the options of all linears, of any form and under any rule (docs/methods.md, 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush

import numpy as np

from spectrim.errors import BudgetError


@dataclass(frozen=True)
class Curve:
    """The options of one linear under a rule.

    ``bytes`` int64 [n] and ``cost`` float64 [n] are what each option takes and what it loses, in a unit that all
    linears share. Rules that give every linear a share of its own size have ``reach`` [n] besides: the value of the
    rule's one parameter, such as the retention, from which on the linear takes the option.
    """

    bytes: np.ndarray
    cost: np.ndarray
    reach: np.ndarray | None = None

    @cached_property
    def front(self) -> np.ndarray:
        """Options that no other one beats in both bytes and cost, int64 [m], by rising bytes and falling cost."""
        order = np.lexsort((self.cost, self.bytes))
        least = np.minimum.accumulate(self.cost[order])
        return order[np.append(True, least[1:] < least[:-1])]

    @cached_property
    def chain(self) -> np.ndarray:
        """Positions on the front that the walk visits: its lower hull, or all of them where there is a ``reach``."""
        if self.reach is not None:
            return np.arange(len(self.front))
        sizes, costs = self.bytes[self.front].tolist(), self.cost[self.front].tolist()
        hull: list[int] = []
        for at in range(len(sizes)):
            while len(hull) > 1:
                a, b = hull[-2:]
                if (costs[a] - costs[b]) * (sizes[at] - sizes[b]) > (costs[b] - costs[at]) * (sizes[b] - sizes[a]):
                    break
                hull.pop()
            hull.append(at)
        return np.array(hull)

    @property
    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and scores of the steps along the chain, in its order; scores never rise."""
        sizes, costs = self.bytes[self.front[self.chain]], self.cost[self.front[self.chain]]
        prices = np.diff(sizes)
        scores = -np.diff(costs) / prices if self.reach is None else -self.reach[self.front[self.chain[1:]]]
        return prices, np.minimum.accumulate(scores)

    def best(self, at: int, left: int) -> tuple[float, int] | None:
        """Score and position of the best step from position `at` of the front that `left` more bytes pay for.

        A score is the cost that a step saves by the byte; where there is a ``reach``, minus that of the option.
        """
        sizes = self.bytes[self.front]
        fit = int(np.searchsorted(sizes, sizes[at] + left, side="right"))
        if fit <= at + 1:
            return None
        if self.reach is not None:  # every linear grows step by step
            return -float(self.reach[self.front[at + 1]]), at + 1
        costs = self.cost[self.front]
        scores = (costs[at] - costs[at + 1 : fit]) / (sizes[at + 1 : fit] - sizes[at])
        best = int(scores.argmax())
        return float(scores[best]), at + 1 + best


def spend(curves: Sequence[Curve], budget: int) -> list[int]:
    """One option of each linear, at most `budget` bytes together and of nearly the least cost.

    All linears start at their smallest option. The steps along their chains are bought in the order of their scores,
    until the budget cannot pay for one: one price of a byte for the whole model. What is left buys the best steps that
    still fit, on the chain or off it, so that in the end no step of any linear fits any more.

    Raises:
        BudgetError: the smallest options together are too large.
    """
    left = budget - sum(int(curve.bytes[curve.front[0]]) for curve in curves)
    if left < 0:
        raise BudgetError(
            f"the budget of {budget} bytes is less than the {budget - left} of the smallest options; raise --retain"
        )
    steps = [curve.steps for curve in curves]
    price = np.concatenate([prices for prices, _ in steps])
    owner = np.repeat(np.arange(len(curves)), [len(prices) for prices, _ in steps])
    order = np.argsort(-np.concatenate([scores for _, scores in steps]), kind="stable")
    taken = order[: int(np.searchsorted(np.cumsum(price[order]), left, side="right"))]
    counts = np.bincount(owner[taken], minlength=len(curves))
    left -= int(price[taken].sum())
    at = [int(curve.chain[count]) for curve, count in zip(curves, counts, strict=True)]
    _fill(curves, at, left)
    return [int(curve.front[position]) for curve, position in zip(curves, at, strict=True)]


def _fill(curves: Sequence[Curve], at: list[int], left: int) -> None:
    """Spend what is left on the best steps that fit; changes the positions `at`."""
    waiting = [
        (-best[0], number, best[1]) for number, curve in enumerate(curves) if (best := curve.best(at[number], left))
    ]
    heapify(waiting)
    while waiting:
        _, number, position = heappop(waiting)
        curve = curves[number]
        sizes = curve.bytes[curve.front]
        price = int(sizes[position] - sizes[at[number]])
        if price <= left:  # else it was the best with more bytes at hand
            left -= price
            at[number] = position
        if best := curve.best(at[number], left):
            heappush(waiting, (-best[0], number, best[1]))
