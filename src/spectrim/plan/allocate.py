"""From spectra and a byte budget to a plan: which linear keeps how many directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import torch

from spectrim.anatomy import Linear
from spectrim.errors import BudgetError
from spectrim.plan.plan import factor_bytes
from spectrim.recipe import AllocationPart


@dataclass(frozen=True)
class Choice:
    """The options of one linear: 0 … n directions, each way smaller than its dense weight, or that weight.

    With a `step` above 1, a direction below stands for so many directions of the spectrum, bought together.

    Purchases are blocks of directions with falling scores, and the dense weight after `jump` of them. Bytes that are
    left at the end may buy parts of blocks, and blocks beyond `jump`.
    """

    sizes: np.ndarray  # int64 [n + 1], increasing: bytes with 0 … n directions, all below `dense`
    dense: int  # bytes of the dense weight
    gains: np.ndarray  # [n]: loss or energy that each direction saves
    ends: np.ndarray  # int64 [blocks]: number of directions after each block, the last n; the first is the least
    scores: np.ndarray  # [blocks]: score of each block, that of the first is infinite
    jump: int  # number of blocks before the dense weight
    whole: float  # score of the dense weight, at most that of the blocks before it
    step: int = 1

    @property
    def prices(self) -> np.ndarray:
        """Bytes of each purchase, int64 [jump + 1], the dense weight last."""
        return np.diff([0, *self.sizes[self.ends[: self.jump]], self.dense])

    @property
    def wanted(self) -> np.ndarray:
        """Scores of the same, [jump + 1]."""
        return np.append(self.scores[: self.jump], self.whole)

    def count(self, bought: int) -> int:
        """Number of directions after `bought` blocks."""
        return int(self.ends[bought - 1]) if bought else 0

    def offer(self, count: int, left: int) -> tuple[float, int, int | None] | None:
        """The best purchase after `count` directions that costs no more than `left` bytes.

        Returns its score, its price and the directions after it (None for the dense weight), or None.
        """
        rest = self.dense - int(self.sizes[count])
        if count >= self.count(self.jump) and rest <= left:
            return self.whole, rest, None
        block = int(np.searchsorted(self.ends, count, side="right"))
        if block == len(self.ends):
            return None
        prices = self.sizes[count + 1 : self.ends[block] + 1] - self.sizes[count]
        fit = int(np.searchsorted(prices, left, side="right"))
        if not fit:
            return None
        if fit == len(prices) and count == self.count(block):
            return float(self.scores[block]), int(prices[-1]), int(self.ends[block])
        # A part of the block that takes away most by the byte; single directions of a block are worth more and more.
        values = self.gains[count : count + fit].cumsum() / prices[:fit]
        best = int(values.argmax())
        return float(values[best]), int(prices[best]), count + best + 1


def choice(
    part: AllocationPart,
    linear: Linear,
    s: torch.Tensor,
    loss: torch.Tensor | None,
    heads: int = 1,
    pivoted: bool = False,
    multiple: int = 1,
) -> Choice:
    """The options of one linear under an allocation rule; its scores are comparable across linears.

    Rules: ``uniform``: minus the retention that the linear has with a direction, so that all grow alike.
    ``global-sigma`` and ``global-sigma-mean``: the raw singular value √s_i (JW-SVD, section 4.2) of the spectrum under
    sums, as the paper writes, or under means. ``global-energy``: s_i / Σs per byte. ``sensitivity``: `s` itself, which
    then holds the measured losses. ``adacr``: minus the target retention at which the linear has the direction, along
    AdaSVD's line ``floor + I (target − floor)``; `s` then holds the linear's importance I. Below the floor all linears
    grow alike. ``loss-aware``: predicted loss per byte (LASER); since the dense weight costs less than all directions,
    it is bought after the rank from which the step to it saves more loss per byte than further directions do: the lower
    hull of loss over bytes.

    Args:
        s: [m] what the rule compares, by direction.
        loss: [m] predicted losses in nats; only ``loss-aware`` reads them.
        heads: parts that are factored apart, each with one direction at least.
        pivoted: store the factors by pivots where that is smaller; a direction then costs less than the one before,
            and where it counts by the byte, several may have to be bought at once. Whole linears only.
        multiple: ranks are multiples of this, or the weight stays dense. Whole linears only.
    """
    values = (s if loss is None or part.rule != "loss-aware" else loss).double().numpy()
    step = multiple if heads == 1 else 1
    starts = np.arange(0, len(values), step)
    counts = np.append(starts, len(values))  # the last may be no multiple: it is never smaller than the dense weight
    values = np.add.reduceat(values, starts)
    sizes = factor_bytes(linear, counts, heads)
    if pivoted and heads == 1:
        sizes = np.minimum(sizes, factor_bytes(linear, counts, pivoted=True))
    n = int((sizes < linear.nbytes).sum()) - 1  # from here on the dense weight costs no more
    prices = np.diff(sizes[: n + 2])  # the last is that of the direction in whose place the dense weight comes
    left = values[::-1].cumsum()[::-1][: n + 1]  # what the dense weight takes away after each number of directions
    if part.rule in ("global-sigma", "global-sigma-mean"):
        values = np.sqrt(values / step)
    elif part.rule == "global-energy":
        values = values / (values.sum() or 1.0)
    elif part.rule in ("uniform", "adacr"):
        retention = (sizes[1:] / sizes[1]) * (sizes[1] / linear.nbytes)
        if part.rule == "adacr":  # an importance of zero never leaves the floor before all others are dense
            line = part.floor + (retention - part.floor) / np.maximum(values / step, 1e-6)
            retention = np.where(retention <= part.floor, retention, line)
        values = -retention
    values = values[: n + 1].copy()
    if part.rule != "loss-aware":
        values[heads:] = np.minimum.accumulate(values[heads:])  # by head, directions are in the order of their losses
    by_byte = part.rule in ("global-energy", "loss-aware")
    scores = values / prices if by_byte else values
    if n < heads:  # the least is the dense weight
        return Choice(sizes[: n + 1], linear.nbytes, values[:n], np.empty(0, int), np.empty(0), 0, np.inf, step)
    ends = _blocks(values[:n], prices[:n], heads) if by_byte else np.arange(heads, n + 1)
    first = np.append(0, ends[:-1])
    singles = ends - first == 1
    sums = np.add.reduceat(values[:n], first) / np.add.reduceat(prices[:n], first)
    worth = np.where(singles, scores[ends - 1], sums)
    worth[0] = np.inf
    jump, whole = len(ends), min(float(scores[n]), float(worth[-1]))
    if part.rule == "loss-aware":
        slopes = left[ends] / (linear.nbytes - sizes[ends])
        jump = int(np.append(worth[1:] <= slopes[:-1], True).argmax()) + 1
        whole = float(slopes[jump - 1])
    return Choice(sizes[: n + 1], linear.nbytes, values[:n], ends, worth, jump, whole, step)


def _blocks(gains: np.ndarray, prices: np.ndarray, least: int) -> np.ndarray:
    """Ends of the blocks of directions whose gain per byte falls from block to block, int64; the first is `least`.

    These are the vertices of the lower hull of what is left over bytes (pool adjacent violators); directions of equal
    worth stay apart.
    """
    blocks: list[tuple[float, float, int]] = []  # gain, bytes and end of each
    for end in range(least + 1, len(gains) + 1):
        gain, price = float(gains[end - 1]), float(prices[end - 1])
        while blocks and gain / price > blocks[-1][0] / blocks[-1][1]:
            more, bytes_, _ = blocks.pop()
            gain, price = gain + more, price + bytes_
        blocks.append((gain, price, end))
    return np.array([least, *(end for _, _, end in blocks)])


def spend(choices: Mapping[str, Choice], budget: int) -> dict[str, int | None]:
    """Buy in the order of the scores until the budget is spent; number of directions by name, None for dense.

    Every linear gets its least first. The walk ends at the first purchase that the budget cannot pay; what is left then
    goes to the next ones that fit, each linear's in order, so that less than one step of any linear stays unspent.

    Raises:
        BudgetError: the least of all linears is already too much.
    """
    names, options = list(choices), list(choices.values())
    prices, wanted = [option.prices for option in options], [option.wanted for option in options]
    least = sum(int(each[0]) for each in prices)
    if least > budget:
        raise BudgetError(
            f"the budget of {budget} bytes is less than the {least} bytes of rank 1 everywhere; raise --retain"
        )
    price = np.concatenate(prices)
    owner = np.repeat(np.arange(len(options)), [len(each) for each in prices])
    order = np.argsort(-np.concatenate(wanted), kind="stable")
    taken = int(np.searchsorted(np.cumsum(price[order]), budget, side="right"))
    blocks = np.bincount(owner[order[:taken]], minlength=len(names)).tolist()
    left = budget - int(price[order[:taken]].sum())
    found = [None if b > option.jump else option.count(b) for option, b in zip(options, blocks, strict=True)]
    _fill(options, found, left)
    counts = [None if count is None else count * option.step for count, option in zip(found, options, strict=True)]
    return dict(zip(names, counts, strict=True))


def _fill(options: Sequence[Choice], found: list[int | None], left: int) -> None:
    """Spend what is left on the purchases that fit, best first; changes the numbers of directions `found`."""
    waiting: list[tuple[float, int, int, int | None]] = []  # minus the score, linear, price, directions after it

    def offer(number: int) -> None:
        count = found[number]
        if count is not None and (best := options[number].offer(count, left)):
            heappush(waiting, (-best[0], number, *best[1:]))

    for number in range(len(options)):
        offer(number)
    while waiting:
        _, number, price, count = heappop(waiting)
        if price <= left:
            left -= price
            found[number] = count
        offer(number)
