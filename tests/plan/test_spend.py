"""The allocator against brute force and against its own laws, for any options."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.plans import totals
from spectrim.errors import BudgetError
from spectrim.plan.spend import Curve, spend


@st.composite
def curves(draw: st.DrawFn, most: int = 5, reach: bool = False) -> Curve:
    """Options in any order, dominated ones and equal ones among them."""
    n = draw(st.integers(1, most))
    sizes = draw(st.lists(st.integers(1, 60), min_size=n, max_size=n))
    costs = draw(st.lists(st.integers(0, 40), min_size=n, max_size=n))
    sizes, costs = np.array(sizes), np.array(costs, dtype=float)
    return Curve(sizes, costs, sizes / sizes.max() if reach else None)


MODELS = st.lists(curves(), min_size=1, max_size=4)
SHARES = st.lists(curves(reach=True), min_size=1, max_size=4)


def least(model) -> int:
    return sum(int(curve.bytes.min()) for curve in model)


@given(MODELS | SHARES, st.integers(0, 300))
def test_never_above_the_budget_and_no_useful_step_fits_any_more(model, more):
    budget = least(model) + more
    found = spend(model, budget)
    size, _ = totals(model, found)
    assert size <= budget
    for curve, now in zip(model, found, strict=True):
        better = (curve.cost < curve.cost[now]) & (curve.bytes - curve.bytes[now] <= budget - size)
        assert not better.any()


@given(MODELS, st.integers(0, 300))
def test_near_the_best_of_all_combinations(model, more):
    budget = least(model) + more
    _, cost = totals(model, spend(model, budget))
    every = [totals(model, found) for found in product(*(range(len(curve.bytes)) for curve in model))]
    best = min(cost for size, cost in every if size <= budget)
    # A greedy walk along hulls misses the optimum by less than the largest step of one linear.
    assert best <= cost <= best + max(float(np.ptp(curve.cost)) for curve in model)


@given(MODELS)
def test_optimal_at_every_vertex_of_the_hull_of_all_combinations(model):
    every = sorted({totals(model, found) for found in product(*(range(len(curve.bytes)) for curve in model))})
    at, vertices = every[0], [every[0]]
    while steeper := [(cost - at[1]) / (size - at[0]) for size, cost in every if size > at[0] and cost < at[1]]:
        slope = min(steeper)
        on = [x for x in every if x[0] > at[0] and x[1] - at[1] == pytest.approx(slope * (x[0] - at[0]))]
        at = max(on)
        vertices.append(at)
    for size, cost in vertices:
        assert totals(model, spend(model, size)) == (size, cost)


@given(SHARES, st.integers(0, 300))
def test_shares_grow_alike(model, more):
    """No linear has passed a step of smaller reach for one of larger reach, but for steps that did not fit."""
    budget = least(model) + more
    found = spend(model, budget)
    left = budget - totals(model, found)[0]
    for curve, now in zip(model, found, strict=True):
        front = curve.front.tolist()
        at = front.index(now)
        if at + 1 < len(front):
            assert curve.bytes[front[at + 1]] - curve.bytes[now] > left


@given(MODELS | SHARES)
def test_more_bytes_never_buy_less(model):
    """A pass over all budgets: what is spent never falls, and of linears with one price neither does what is gained."""
    most = sum(int(curve.bytes.max()) for curve in model)
    found = [totals(model, spend(model, budget)) for budget in range(least(model), most + 2)]
    assert found == sorted(found, key=lambda total: total[0])
    if model[0].reach is None:
        assert found == sorted(found, key=lambda total: -total[1])


def test_a_budget_below_the_least_is_refused():
    model = [Curve(np.array([5, 9]), np.array([2.0, 0.0])), Curve(np.array([4]), np.array([0.0]))]
    with pytest.raises(BudgetError, match="8 bytes is less than the 9"):
        spend(model, 8)
    assert spend(model, 9) == [0, 0]
    assert spend(model, 13) == [1, 0]


def test_what_is_left_buys_the_step_that_saves_most_by_the_byte():
    """Neither the smallest that fits nor the largest; steps along the hulls, to 20 and 30 bytes, are too dear."""
    deep = Curve(np.array([1, 2, 4, 20]), np.array([10, 9.9, 9, 0]))
    other = Curve(np.array([1, 3, 30]), np.array([10, 9.4, 0]))
    assert spend([deep, other], 5) == [2, 0]
    early = Curve(np.array([1, 2, 4, 20]), np.array([10, 9.5, 9.3, 0]))
    other = Curve(np.array([1, 4, 30]), np.array([10, 9.1, 0]))
    assert spend([early, other], 5) == [2, 0]


def test_one_price_of_a_byte():
    steep = Curve(np.array([1, 2, 3]), np.array([9.0, 4.0, 3.0]))
    flat = Curve(np.array([1, 2, 3]), np.array([9.0, 7.0, 5.5]))
    assert [spend([steep, flat], budget) for budget in (2, 3, 4, 5, 6)] == [[0, 0], [1, 0], [1, 1], [1, 2], [2, 2]]
