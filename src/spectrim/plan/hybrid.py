"""Every linear chooses how it is stored: dense, factored, integers, or factors and integers together.

The predicted loss of an option that holds integers needs no integers: after error feedback the rounding residuals r are
as large as those of rounding to nearest on the same grid, and the error is ``Σ S_ii² r_ij² T_jj²`` (see
:mod:`spectrim.maths.rounding`), so one rounding to nearest predicts the loss of an option. Only the options that the
plan chooses are quantized with error feedback.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from spectrim.anatomy import Linear
from spectrim.calibrate import Statistics
from spectrim.errors import BudgetError, NumericalError, RecipeError
from spectrim.maths.decompose import Rank, sides
from spectrim.maths.roots import check_finite, times_metric
from spectrim.maths.rounding import Grid, conditional, expected, fitting_group
from spectrim.metrics.metric import Metric, layer_metric
from spectrim.metrics.spectra import Spectra
from spectrim.plan.plan import Integers, PlanRow, pays_by_pivots, plan_row, row_bytes
from spectrim.recipe import Recipe
from spectrim.storage.make import Stored, make_stored

BITS = (2, 3, 4, 8)  # of integers where the recipe leaves them to the allocation
RESIDUAL_BITS = (2, 3, 4)  # of a whole weight that has factors beside it
FACTOR_BITS = 8  # of those factors
RANKS = 32  # ranks that are options are multiples of this, or of `storage.multiple` above it
FEED_FORWARD = ("gate", "up", "down", "gate_up", "fc1", "fc2")


@dataclass(frozen=True)
class Option:
    """One way to store a linear: as in its row of the plan, with its bytes and its cost in the rule's unit."""

    rank: Rank | None
    integers: Integers | None
    bytes: int
    cost: float
    pivoted: bool = False

    def row(self, linear: Linear, **notes: Any) -> PlanRow:
        """The row of the plan that says so; `notes` are error, metric and loss of `plan_row`."""
        return plan_row(linear, self.rank, pivoted=self.pivoted, integers=self.integers, **notes)


class Hybrid:
    """The options of all linears of one model under one recipe, and the integers of those that are chosen."""

    def __init__(self, model: nn.Module, recipe: Recipe, statistics: Statistics | None, spectra: Spectra) -> None:
        if recipe.allocation.rule not in ("uniform", "global-energy", "loss-aware"):
            raise RecipeError(
                f"allocation '{recipe.allocation.rule}' cannot compare integers with factors; "
                "set allocation.rule=loss-aware, global-energy or uniform"
            )
        self._model, self._recipe, self._statistics, self._spectra = model, recipe, statistics, spectra
        self._options: dict[str, list[Option]] = {}
        self._stored: dict[tuple[str, str], Stored] = {}

    def rows(self, linears: Sequence[Linear], budget: int) -> dict[str, PlanRow]:
        """The rows of the linears that share `budget` bytes; by name."""
        options = {linear.name: self.options(linear) for linear in linears}
        if self._recipe.allocation.rule == "uniform":
            chosen = alike(options, {linear.name: linear.nbytes for linear in linears}, budget)
        else:
            chosen = cheapest(options, budget)
        rows = {}
        for linear in linears:
            option, loss = chosen[linear.name], None
            if self._spectra.losses(linear.name) is not None:
                loss = option.cost
            source = self._spectra.sources[linear.name]
            error = option.cost / max(self._unit(linear.name), 1e-300)
            rows[linear.name] = option.row(linear, error=error, metric=source, loss=loss)
        return rows

    def options(self, linear: Linear) -> list[Option]:
        """All options of one linear, with predicted costs: nats under curvature, else shares of its energy."""
        if linear.name not in self._options:
            try:
                self._options[linear.name] = self._make(linear)
            except NumericalError as error:
                raise NumericalError(f"{linear.name}: {error}") from error
        return self._options[linear.name]

    def stored(self, linear: Linear, row: PlanRow) -> Stored:
        """The integers (and factors) of a row that has some; made once."""
        key = (linear.name, row.model_dump_json(include={"rank", "integers"}))
        if key not in self._stored:
            self._stored = {other: found for other, found in self._stored.items() if other[0] != linear.name}
            assert row.integers is not None
            W, found = self._weight(linear), None
            if row.rank is not None and row.integers.residual is None:
                found = self._spectra.directions(linear.name, row.rank, W.device)
            metric, how = self._metric(linear, W), self._recipe.quantize.feedback
            self._stored[key] = make_stored(W, linear, row, metric.value, metric.output, damping=how, found=found)
        return self._stored[key]

    def _weight(self, linear: Linear) -> torch.Tensor:
        weight = self._model.get_submodule(linear.name).weight
        assert isinstance(weight, torch.Tensor)
        return check_finite(f"the weight of {linear.name}", weight.detach()).double()

    def _metric(self, linear: Linear, W: torch.Tensor) -> Metric:
        return layer_metric(self._recipe.metric, linear, self._statistics, W.device)

    def _metrics(self, linear: Linear, W: torch.Tensor) -> tuple[Metric, torch.Tensor | None, torch.Tensor | None]:
        """The metric of a linear, and C and G in the unit of its costs."""
        metric = self._metric(linear, W)
        if metric.output is None:
            G = torch.full((len(W),), self._scale(linear.name), dtype=W.dtype, device=W.device)
            return metric, metric.value, G
        return metric, metric.value, metric.output.dense(len(W), W.device)

    def _unit(self, name: str) -> float:
        """The cost of a linear of rank 0."""
        losses = self._spectra.losses(name)
        return 1.0 if losses is None else float(losses.sum())

    def _scale(self, name: str) -> float:
        """What turns squared error into a share of the energy."""
        return 1 / max(float(self._spectra.values(name).sum()), 1e-300)

    def _make(self, linear: Linear) -> list[Option]:
        part, spectra = self._recipe.quantize, self._spectra
        heads, losses = spectra.heads(linear.name), spectra.losses(linear.name)
        costs = spectra.values(linear.name) * self._scale(linear.name) if losses is None else losses
        left = torch.cat([costs.flip(0).cumsum(0).flip(0), costs.new_zeros(1)]).tolist()
        integers, step = part.roles == "all" or linear.role in FEED_FORWARD, self._step(len(left) - 1, heads)
        found, dense = [], Option(None, None, linear.nbytes, 0.0)
        if part.bits == "auto" or not integers:
            for count in range(max(heads, step), len(left), step):
                rank = spectra.rank(linear.name, count)
                pivoted = self._recipe.storage.pivoted and pays_by_pivots(linear, rank)
                if (size := row_bytes(linear, rank, None, pivoted)) < linear.nbytes:
                    found.append(Option(rank, None, size, left[count], pivoted))
        if not integers:
            return [dense, *found]
        W = self._weight(linear)
        _, C, G = self._metrics(linear, W)
        s, t = self._weights(G, len(W), W), self._weights(C, W.shape[1], W)
        price = partial(expected, dtype=linear.dtype)
        make = partial(Integers, group=part.group, symmetric=part.symmetric)
        menu: tuple[int, ...] = BITS if part.bits == "auto" else (part.bits,) if part.bits else ()
        for bits in menu:
            noise = price(W, self._grid(bits, W.shape[1]), t, s)
            total, alone = float(noise.sum()), make(bits=bits)
            found.append(Option(None, alone, row_bytes(linear, None, alone), total))
            if part.bits == "auto" and bits in RESIDUAL_BITS and heads == 1:
                # Predicted loss with k directions: rounding residuals are modelled as independent, by a matrix N with
                # their predicted sizes and random signs; the k largest eigenvalues of N Nᵀ are subtracted.
                N = noise.sqrt() if len(W) <= W.shape[1] else noise.sqrt().T
                N = N * torch.randn(N.shape, generator=torch.Generator().manual_seed(0), dtype=N.dtype).sign().to(N)
                taken = torch.linalg.eigvalsh(N @ N.T).flip(0).cumsum(0).tolist()
                both = make(bits=FACTOR_BITS, residual=bits)
                for count in range(step, min(4 * step, (len(left) - 1) // 2) + 1, step):
                    found.append(Option(count, both, row_bytes(linear, count, both), total - taken[count - 1]))
        if heads == 1:
            A, B = sides(W, *spectra.directions(linear.name, len(left) - 1, W.device)[1:])
            A, B = A.double(), B.double()
            energy = (times_metric(B, C) * B).sum(1)  # of B C Bᵀ, which is diagonal
            gain = (times_metric(A.T, G) * A.T).sum(1)  # of AᵀGA, likewise
            for bits in menu:
                noise_A = price(A, self._grid(bits, A.shape[1]), energy, s).sum(0)
                noise_B = price(B, self._grid(bits, B.shape[1]), t, gain).sum(1)
                added = (noise_A + noise_B).cumsum(0).tolist()
                each = make(bits=bits)
                for count in range(step, len(left), step):
                    found.append(Option(count, each, row_bytes(linear, count, each), left[count] + added[count - 1]))
        smaller = [option for option in found if option.bytes < linear.nbytes]
        return [dense, *smaller] if part.bits == "auto" or not smaller else smaller

    def _step(self, most: int, heads: int) -> int:
        """Distance between the ranks that are options; less for small linears. All are multiples of it."""
        step, multiple = RANKS if most >= 4 * RANKS else 8 if most >= RANKS else 1, self._recipe.storage.multiple
        return step if heads > 1 else -(-step // multiple) * multiple

    def _grid(self, bits: int, size: int) -> Grid:
        part = self._recipe.quantize
        return Grid(bits, fitting_group(size, part.group), part.symmetric)

    def _weights(self, M: torch.Tensor | None, size: int, like: torch.Tensor) -> torch.Tensor:
        """Weights of squared rounding residuals on one side, which are far smaller with error feedback; [size]."""
        damping = self._recipe.quantize.feedback
        if M is None or M.ndim == 1 or damping is not None:
            return conditional(M, size, like, damping or 0.0)
        return M.diagonal().to(like)


def cheapest(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option of each linear, of at most `budget` bytes together and of nearly the least cost.

    One price of a byte for the whole model: each linear walks the lower hull of its options' costs over bytes, steepest
    steps first. What is left is spent on the exchanges that save most per byte, hull or not.

    Raises:
        BudgetError: the smallest options together are too large.
    """
    hulls = {name: _hull(found) for name, found in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(option.bytes for option in chosen.values())
    if left < 0:
        raise BudgetError(
            f"the budget of {budget} bytes is less than the {budget - left} of the smallest options; raise --retain"
        )
    steps = [
        ((before.cost - after.cost) / (after.bytes - before.bytes), number, name, after)
        for name, hull in hulls.items()
        for number, (before, after) in enumerate(pairwise(hull))
    ]
    for _, _, name, after in sorted(steps, key=lambda step: (-step[0], step[1])):
        if after.bytes - chosen[name].bytes > left:
            break
        left -= after.bytes - chosen[name].bytes
        chosen[name] = after
    _spend(options, chosen, left)
    return chosen


def alike(options: Mapping[str, Sequence[Option]], dense: Mapping[str, int], budget: int) -> dict[str, Option]:
    """One option of each linear, of at most `budget` bytes together: of least cost at one retention for all.

    The retention, of `dense` bytes, is the largest that the budget pays; a linear without an option that small has its
    smallest. What is left is spent as in :func:`cheapest`.

    Raises:
        BudgetError: the smallest options together are too large.
    """

    def at(share: float) -> dict[str, Option]:
        found = {}
        for name, menu in options.items():
            least = min(option.bytes for option in menu) / dense[name]
            fitting = [option for option in menu if option.bytes / dense[name] <= max(share, least)]
            found[name] = min(fitting, key=lambda option: option.cost)
        return found

    def spent(share: float) -> int:
        return sum(option.bytes for option in at(share).values())

    shares = sorted({0.0, *(option.bytes / dense[name] for name, menu in options.items() for option in menu)})
    paid = bisect_right(shares, budget, key=spent)
    if not paid:
        raise BudgetError(
            f"the budget of {budget} bytes is less than the {spent(0.0)} of the smallest options; raise --retain"
        )
    chosen = at(shares[paid - 1])
    _spend(options, chosen, budget - spent(shares[paid - 1]))
    return chosen


def _spend(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: int) -> None:
    """Spend `left` bytes on the exchanges that save most cost per byte, until none fits; changes `chosen`."""
    best = {name: _exchange(found, chosen[name], left) for name, found in options.items()}
    while any(best.values()):
        name = max((name for name in best if best[name]), key=lambda name: _slope(chosen[name], best[name]))
        option = best[name]
        assert option is not None
        if option.bytes - chosen[name].bytes <= left:
            left -= option.bytes - chosen[name].bytes
            chosen[name] = option
        best[name] = _exchange(options[name], chosen[name], left)


def _exchange(options: Sequence[Option], now: Option, left: int) -> Option | None:
    """The option that saves most cost per byte in place of `now`, of those that `left` more bytes pay for."""
    found = [option for option in options if option.cost < now.cost and option.bytes - now.bytes <= left]
    return max(found, key=lambda option: _slope(now, option), default=None)


def _hull(options: Sequence[Option]) -> list[Option]:
    """Vertices of the lower hull of cost over bytes, from the smallest option to the one of least cost."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option | None) -> float:
    """Cost that a step takes away per byte."""
    assert after is not None
    return (before.cost - after.cost) / max(after.bytes - before.bytes, 1)
