"""Loss-aware allocation against every possible plan of a few small linears."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectrim.plan.allocate import choice, spend

from spectrim.errors import BudgetError
from spectrim.linear import Linear
from spectrim.recipe import AllocationPart

PART = AllocationPart(rule="loss-aware")
Model = list[tuple[Linear, torch.Tensor, int]]  # linear, losses by direction, heads


@st.composite
def models(draw: st.DrawFn) -> Model:
    found: Model = []
    for number in range(draw(st.integers(1, 3))):
        heads = draw(st.sampled_from([1, 1, 2, 3]))
        out, size = heads * draw(st.integers(1, 5)), draw(st.integers(1, 8))
        each = min(out // heads, size)
        values = torch.rand(heads, each, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31)))).double()
        values = values ** draw(st.integers(0, 6)) * draw(st.sampled_from([0.0, 1.0, 1.0, 5.0]))
        if draw(st.booleans()):
            values = (4 * values).ceil()  # ties
        values = values.sort(1, descending=True).values
        first, rest = values[:, 0], values[:, 1:].flatten().sort(descending=True).values
        one = Linear(f"l{number}", "backbone", None, "q", out, size, heads, torch.float32)
        found.append((one, torch.cat([first, rest]), heads))
    return found


def price(one: Linear, heads: int, count: int | None) -> int:
    """Bytes of a linear, by its shape: each direction has one entry for each input and each output of its head."""
    dense = 4 * one.out_features * one.in_features
    return dense if count is None else 4 * count * (one.out_features // heads + one.in_features)


def rows(one: Linear, loss: torch.Tensor, heads: int) -> list[tuple[int, float, int | None]]:
    """Bytes, predicted loss and count of every choice for one linear."""
    counted = [(price(one, heads, n), float(loss[n:].sum()), n) for n in range(heads, len(loss) + 1)]
    return [*counted, (price(one, heads, None), 0.0, None)]


def plans(model: Model) -> np.ndarray:
    """Bytes and predicted loss of all plans, [plans, 2]."""
    found = itertools.product(*(rows(*each) for each in model))
    return np.array([(sum(size for size, _, _ in plan), sum(loss for _, loss, _ in plan)) for plan in found])


def outcome(model: Model, budget: int) -> tuple[int, float]:
    """Bytes and predicted loss of what is bought."""
    choices = {one.name: choice(PART, one, 0 * loss, loss, heads) for one, loss, heads in model}
    bought = spend(choices, budget)
    size = sum(price(one, heads, bought[one.name]) for one, _, heads in model)
    left = [loss[count:].sum() for one, loss, _ in model if (count := bought[one.name]) is not None]
    return size, float(sum(left))


def hull(model: Model) -> list[tuple[float, int, float]]:
    """Segments (loss per byte, bytes, loss) of the pooled lower hull, steepest first; from the points themselves."""
    segments = []
    for each in model:
        points = sorted((size, loss) for size, loss, _ in rows(*each))
        at = next(point for point in points if point[0] == min(size for size, _ in points))
        while later := [point for point in points if point[0] > at[0] and point[1] <= at[1]]:
            best = min(later, key=lambda point: ((point[1] - at[1]) / (point[0] - at[0]), -point[0]))
            segments.append(((at[1] - best[1]) / (best[0] - at[0]), best[0] - at[0], at[1] - best[1]))
            at = best
    return sorted(segments, key=lambda segment: -segment[0])  # of equal ones the first linear's first


def least(model: Model) -> int:
    return sum(min(size for size, _, _ in rows(*each)) for each in model)


def dense(model: Model) -> int:
    return sum(price(one, heads, None) for one, _, heads in model)


@settings(max_examples=250, deadline=None)
@given(models(), st.floats(0, 1))
def test_no_plan_is_much_better(model, share):
    budget = int(least(model) + share * (dense(model) - least(model)))
    size, loss = outcome(model, budget)
    assert size <= budget
    every = plans(model)
    best = every[every[:, 0] <= budget, 1].min()
    largest = max((gain for _, _, gain in hull(model)), default=0.0)
    assert best - 1e-9 <= loss <= best + largest + 1e-9


@settings(max_examples=150, deadline=None)
@given(models())
def test_no_plan_is_better_at_the_vertices_of_the_pooled_hull(model):
    every, spent = plans(model), least(model)
    for _, size, _ in [(0.0, 0, 0.0), *hull(model)]:
        spent += size
        assert outcome(model, spent)[1] == pytest.approx(every[every[:, 0] <= spent, 1].min(), abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(models())
def test_more_budget_never_costs_loss(model):
    losses = [outcome(model, budget)[1] for budget in range(least(model), dense(model) + 5, 4)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(losses))
    assert losses[-1] == 0


@settings(max_examples=100, deadline=None)
@given(models(), st.floats(0, 1))
def test_nothing_that_is_wanted_fits_in_what_is_left(model, share):
    budget = int(least(model) + share * (dense(model) - least(model)))
    left = budget - outcome(model, budget)[0]
    bought = spend({one.name: choice(PART, one, 0 * loss, loss, heads) for one, loss, heads in model}, budget)
    for one, _, heads in model:
        if (count := bought[one.name]) is not None:
            assert count >= heads
            now = price(one, heads, count)
            assert now < price(one, heads, None)
            assert left < min(price(one, heads, count + 1), price(one, heads, None)) - now


@given(models())
def test_less_than_one_direction_for_each_head_is_refused(model):
    choices = {one.name: choice(PART, one, 0 * loss, loss, heads) for one, loss, heads in model}
    spend(choices, least(model))
    with pytest.raises(BudgetError, match=f"less than the {least(model)} bytes"):
        spend(choices, least(model) - 1)


def test_the_dense_weight_is_bought_early_where_the_loss_falls_little_by_little():
    """A flat spectrum makes the way to the dense weight pay more by the byte than any direction."""
    flat = (Linear("flat", "backbone", None, "up", 8, 8, None, torch.float32), torch.ones(8).double(), 1)
    steep = (Linear("steep", "backbone", None, "up", 8, 8, None, torch.float32), 4.0 ** -torch.arange(8).double(), 1)
    model = [flat, steep]
    choices = {one.name: choice(PART, one, 0 * loss, loss, heads) for one, loss, heads in model}
    bought = spend(choices, price(*flat[::2], None) + price(*steep[::2], 1))
    assert bought == {"flat": None, "steep": 1}
