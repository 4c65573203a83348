"""Allocation: budgets that are never broken and never wasted, and each rule against its own definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spectrim.plan.allocate import spend

from helpers.plans import least_and_dense, linear, models, options, price, spectrum, spent
from spectrim.errors import BudgetError

RULES = ("uniform", "global-sigma", "global-sigma-mean", "global-energy", "sensitivity")


@settings(max_examples=200, deadline=None)
@given(models(), st.sampled_from(RULES), st.floats(0, 1))
def test_budget_is_met_within_one_step(model, rule, share):
    least, dense = least_and_dense(model)
    budget = int(least + share * (dense - least))
    ranks = spend(options(model, rule), budget)
    assert ranks.keys() == model.keys()
    left = budget - spent(model, ranks)
    assert left >= 0
    for name, (one, _) in model.items():
        rank = ranks[name]
        if rank is not None:
            assert price(one, rank) < price(one, None)  # factoring that saves nothing is not done
            assert left < min(price(one, rank + 1), price(one, None)) - price(one, rank)


@settings(max_examples=100, deadline=None)
@given(models(), st.sampled_from(RULES))
def test_more_budget_never_buys_fewer_bytes(model, rule):
    least, dense = least_and_dense(model)
    budgets = sorted({int(b) for b in np.linspace(least, dense, 12)} | {least + 1, dense + 1})
    offered = options(model, rule)
    kept = [spent(model, spend(offered, budget)) for budget in budgets]
    assert kept == sorted(kept)
    assert kept[-1] == dense
    assert set(spend(offered, dense).values()) == {None}


@settings(max_examples=100, deadline=None)
@given(models(), st.floats(0.2, 0.9))
def test_uniform_is_equal_retention(model, retain):
    least, dense = least_and_dense(model)
    budget = int(retain * dense)
    assume(least <= budget)
    ranks = spend(options(model, "uniform"), budget)
    following = {name: price(one, rank + 1) / one.nbytes for name, (one, _) in model.items() if (rank := ranks[name])}
    if not following:
        return
    level = min(following.values())  # the walk ended here; what was left then went to the linears that it could pay
    extra = 0
    for name, (one, _) in model.items():
        exact = level * one.nbytes / price(one, 1)
        least_rank, most_rank = max(1, math.ceil(exact - 1e-9) - 1), max(1, math.floor(exact + 1e-9))
        held = price(one, ranks[name])
        assert held >= min(price(one, least_rank), price(one, None))
        extra += max(0, held - price(one, most_rank))
    assert extra <= max(price(one, 1) for one, _ in model.values())


def test_uniform_on_many_equal_shapes_gives_the_textbook_rank():
    """k = retain · out · in / (out + in), rounded down, plus what rounding left over."""
    model = {f"l{i}": (linear(i, 64, 96), spectrum(64, i)) for i in range(20)}
    for retain in (0.2, 0.4, 0.6, 0.8):
        exact = retain * 64 * 96 / (64 + 96)
        ranks = spend(options(model, "uniform"), int(retain * least_and_dense(model)[1]))
        assert set(ranks.values()) <= {math.floor(exact), math.ceil(exact)}


def threshold_ranks(model, values, at: float) -> dict[str, int | None]:
    """Ranks by counting what is at or above a threshold; dense from the break-even rank on."""
    ranks: dict[str, int | None] = {}
    for name, (one, s) in model.items():
        rank = max(1, int((values(one, s) >= at).sum()))
        ranks[name] = None if price(one, rank) >= price(one, None) else rank
    return ranks


VALUES = {
    "global-sigma": lambda one, s: s.sqrt(),
    "global-sigma-mean": lambda one, s: s.sqrt(),
    "global-energy": lambda one, s: s / s.sum() / price(one, 1),
    "sensitivity": lambda one, s: s,
}


@pytest.mark.parametrize("rule", VALUES)
@pytest.mark.parametrize("quantile", [0.3, 0.6, 0.8, 0.95])
def test_one_threshold_for_all(rule, quantile):
    shapes = [(12, 20), (30, 8), (16, 16), (5, 90), (64, 64), (40, 120)]  # a direction costs 32 to 160
    model = {f"l{i}": (linear(i, *shape), (1 + i) * spectrum(min(shape), i)) for i, shape in enumerate(shapes)}
    values = VALUES[rule]
    pool = torch.cat([values(one, s) for one, s in model.values()]).sort().values
    expected = threshold_ranks(model, values, float(pool[int(quantile * len(pool))]))
    assert spend(options(model, rule), spent(model, expected)) == expected


def test_sensitivity_does_not_follow_the_shape():
    """Of two equal linears the one whose loss is larger keeps more."""
    model = {"l0": (linear(0, 16, 16), spectrum(16, 0)), "l1": (linear(1, 16, 16), 10 + spectrum(16, 1))}
    ranks = spend(options(model, "sensitivity"), least_and_dense(model)[1] // 2)
    assert ranks["l0"] < ranks["l1"]


def test_a_linear_that_factoring_cannot_shrink_is_dense():
    one = linear(0, 1, 9)
    assert spend(options({"l0": (one, spectrum(1, 0))}, "uniform"), one.nbytes) == {"l0": None}


@given(models(), st.sampled_from(RULES))
def test_less_than_rank_one_everywhere_is_refused(model, rule):
    least, _ = least_and_dense(model)
    spend(options(model, rule), least)
    with pytest.raises(BudgetError, match=f"less than the {least} bytes of rank 1 everywhere"):
        spend(options(model, rule), least - 1)
