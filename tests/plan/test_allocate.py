"""Rules and allocator together, on linears that are no more than shapes and spectra: exact budgets, each rule by its
own definition, and every possible plan of a few small linears."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.plans import (
    RULES,
    THRESHOLDS,
    Model,
    between,
    bought,
    choices,
    curves,
    least_and_dense,
    linear,
    lost,
    menus,
    models,
    owed,
    price,
    shaped,
    spectrum,
    spent,
    values,
)
from spectrim.errors import BudgetError
from spectrim.plan.options import menu
from spectrim.plan.rules import curve
from spectrim.plan.spend import spend
from spectrim.recipe import AllocationPart
from spectrim.storage.base import tensors_of

COSTS = ("global-energy", "loss-aware", *THRESHOLDS)
SHARES = st.lists(st.sampled_from([0.0, 0.01, 0.5, 1.0, 1.3, 11.0]), min_size=4, max_size=4)


def worth(rule: str, problem, rank: int | None) -> float:
    """What the rule has a linear lose at a rank."""
    return owed(rule, problem, rank) if rule in COSTS else lost(problem, rank)


@given(models())
def test_the_options_are_the_ranks_that_are_smaller_than_the_weight_and_the_weight(model):
    for problem, offered in zip(model, menus(model), strict=True):
        one, found = problem.linear, {}
        for number in range(len(offered.bytes)):
            form, spec = offered.option(number)
            stored = tensors_of(form, one.in_features, one.out_features, spec, one.dtype)
            size = sum(tensor.nbytes for tensor in stored.values())
            rank = spec.get("rank")
            if isinstance(rank, list):
                assert len(rank) == problem.heads > 1
                assert rank == problem.spectrum.head[: sum(rank)].bincount(minlength=len(rank)).tolist()
                rank = sum(rank)
            assert size == offered.bytes[number] == price(problem, rank)
            assert offered.error[number] == pytest.approx(lost(problem, rank), rel=1e-12, abs=1e-300)
            found[rank] = number
        assert sorted(found, key=lambda rank: math.inf if rank is None else rank) == choices(problem)


@settings(max_examples=300, deadline=None)
@given(models(), st.sampled_from(RULES), SHARES, st.floats(0, 0.9), st.floats(0, 1))
def test_the_budget_is_met_within_one_useful_step(model, rule, shares, floor, share):
    budget = between(least_and_dense(model), share)
    ranks = bought(model, rule, budget, shares=shares, floor=floor)
    left = budget - spent(model, ranks)
    assert left >= 0
    for problem, rank in zip(model, ranks, strict=True):
        assert rank in choices(problem)
        now = worth(rule, problem, rank)
        for other in choices(problem):
            useful = worth(rule, problem, other) < now * (1 - 1e-9)
            assert not (useful and price(problem, other) - price(problem, rank) <= left)


@settings(max_examples=100, deadline=None)
@given(models(), st.sampled_from(RULES))
def test_enough_bytes_buy_all_that_is_of_use_and_too_few_are_refused(model, rule):
    least, dense = least_and_dense(model)
    assert all(worth(rule, x, rank) == 0 for x, rank in zip(model, bought(model, rule, dense), strict=True))
    bought(model, rule, least)
    with pytest.raises(BudgetError, match=rf"{least - 1} bytes is less than the {least} of the smallest .*--retain"):
        bought(model, rule, least - 1)


@settings(max_examples=80, deadline=None)
@given(models(), st.sampled_from(RULES))
def test_more_bytes_never_buy_less(model, rule):
    offered, ends = curves(model, rule), least_and_dense(model)
    found = [spend(offered, budget) for budget in sorted({between(ends, share) for share in np.linspace(0, 1, 24)})]
    sizes = [sum(int(c.bytes[i]) for c, i in zip(offered, plan, strict=True)) for plan in found]
    assert sizes == sorted(sizes)
    if rule in COSTS:
        costs = [math.fsum(float(c.cost[i]) for c, i in zip(offered, plan, strict=True)) for plan in found]
        assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(costs))


# ---- rules that add up costs, against every plan ----


def plans(model: Model, rule: str) -> np.ndarray:
    """Bytes and cost of all plans, [plans, 2]."""
    each = [[(price(x, rank), owed(rule, x, rank)) for rank in choices(x)] for x in model]
    return np.array([tuple(map(sum, zip(*plan, strict=True))) for plan in itertools.product(*each)])


def hull(model: Model, rule: str) -> list[tuple[float, int, float]]:
    """Segments (cost per byte, bytes, cost) of the lower hulls of all linears, steepest first; from the points."""
    segments = []
    for problem in model:
        points = [(price(problem, rank), owed(rule, problem, rank)) for rank in choices(problem)]
        at = points[0]
        while later := [point for point in points if point[0] > at[0] and point[1] < at[1]]:
            best = min(later, key=lambda point: ((point[1] - at[1]) / (point[0] - at[0]), -point[0]))
            segments.append(((at[1] - best[1]) / (best[0] - at[0]), best[0] - at[0], at[1] - best[1]))
            at = best
    return sorted(segments, key=lambda segment: -segment[0])


def outcome(model: Model, rule: str, budget: int) -> float:
    return sum(owed(rule, x, rank) for x, rank in zip(model, bought(model, rule, budget), strict=True))


@pytest.mark.parametrize("rule", COSTS)
@settings(max_examples=100, deadline=None)
@given(model=models(5, 10, 3), share=st.floats(0, 1))
def test_no_plan_is_better_by_more_than_a_segment_of_the_hull(model, rule, share):
    budget, every = between(least_and_dense(model), share), plans(model, rule)
    best = every[every[:, 0] <= budget, 1].min()
    most = max((gain for _, _, gain in hull(model, rule)), default=0.0)
    slack = 1e-9 * every[:, 1].max()
    assert best - slack <= outcome(model, rule, budget) <= best + most + slack


@pytest.mark.parametrize("rule", COSTS)
@settings(max_examples=100, deadline=None)
@given(model=models(5, 10, 3))
def test_no_plan_is_better_where_the_hull_has_one_vertex(model, rule):
    """At the ends of runs of equally steep segments, whose order is free."""
    every, used, segments = plans(model, rule), least_and_dense(model)[0], hull(model, rule)
    for (slope, size, _), after in itertools.zip_longest(segments, segments[1:]):
        used += size
        if after is None or after[0] < slope * (1 - 1e-9):
            best = every[every[:, 0] <= used, 1].min()
            assert outcome(model, rule, used) == pytest.approx(best, rel=1e-9, abs=1e-9 * every[:, 1].max())


def test_the_dense_weight_is_bought_early_where_the_cost_falls_little_by_little():
    """A flat spectrum makes the way to the dense weight pay more by the byte than any direction."""
    model = [shaped(linear(0, 8, 8), torch.ones(8).double()), shaped(linear(1, 8, 8), 4.0 ** -torch.arange(8).double())]
    for rule in ("loss-aware", "sensitivity", "global-sigma"):
        ranks = bought(model, rule, price(model[0], None) + price(model[1], 1))
        assert ranks == [None, 1]


def test_directions_that_get_cheaper_are_bought_together():
    """Of equal directions in pivoted form the later ones cost less, so that all are worth it, or none."""
    model = [shaped(linear(number, 40, 60), torch.ones(40).double(), pivoted=True) for number in range(2)]
    ranks = bought(model, "loss-aware", least_and_dense(model)[1] // 2 + price(model[0], 1))
    assert sorted(rank or 40 for rank in ranks)[0] < 3


# ---- thresholds ----


@settings(max_examples=200, deadline=None)
@given(models(), st.sampled_from(THRESHOLDS), st.floats(0, 1))
def test_a_threshold_takes_exactly_the_directions_above_it(model, rule, share):
    """Of each linear all of them, or the dense weight where that takes so few bytes more that it is worth them."""
    pool = torch.cat([values(rule, problem) for problem in model]).unique()
    below, above = (float(pool[max(0, min(int(share * len(pool)) + end, len(pool) - 1))]) for end in (-1, 0))
    assume(above > below * (1 + 1e-6))
    threshold, expected = (below + above) / 2, []
    for problem in model:
        sums = {rank: owed(rule, problem, rank) + threshold * price(problem, rank) for rank in choices(problem)}
        (rank, best), *others = sorted(sums.items(), key=lambda item: item[1])
        assume(not others or others[0][1] > best * (1 + 1e-9))
        if rank is not None and problem.storage.multiple == 1:
            assert rank == problem.heads + int((values(rule, problem)[problem.heads :] > threshold).sum())
        expected.append(rank)
    assert bought(model, rule, spent(model, expected)) == expected


def test_dead_heads_do_not_hide_the_others():
    """Each head has one direction at least; one that is worth nothing says nothing of the rest."""
    dead = torch.stack([torch.zeros(8), *(spectrum(8, seed) for seed in range(2))]).double()
    model = [shaped(linear(0, 24, 30, heads=3), 100 * dead), shaped(linear(1, 24, 30), spectrum(24, 3))]
    for rule in THRESHOLDS:
        assert bought(model, rule, least_and_dense(model)[0] + 3 * price(model[0], 1))[0] == 6


def test_sensitivity_does_not_follow_the_shape():
    """Of two equal linears the one whose loss is larger keeps more."""
    model = [shaped(linear(0, 16, 16), spectrum(16, 0)), shaped(linear(1, 16, 16), 10 + spectrum(16, 1))]
    first, second = bought(model, "sensitivity", least_and_dense(model)[1] // 2)
    assert first < second


def test_what_seems_to_be_worth_nothing_is_bought_last():
    """A truncation that lost nothing on the samples still lost something."""
    problems = [shaped(linear(i, 16, 16), spectrum(16, i)) for i in range(2)]
    wanted = [torch.tensor([1.0] * 3 + [0.0] * 13), torch.linspace(1, 0.1, 16)]
    part = AllocationPart(rule="sensitivity")
    found = [curve(part, menu(x), each) for x, each in zip(problems, wanted, strict=True)]
    ranks = {}
    for budget in (price(problems[0], 3) + price(problems[0], None), 2 * price(problems[0], None)):
        chosen = zip(problems, spend(found, budget), strict=True)
        ranks[budget] = [menu(x).option(number)[1].get("rank") for x, number in chosen]
    assert list(ranks.values()) == [[3, None], [None, None]]


# ---- shares ----


@settings(max_examples=200, deadline=None)
@given(models(), st.sampled_from(["uniform", "adacr"]), SHARES, st.sampled_from([0.0, 0.3]), st.floats(0, 1))
def test_linears_grow_alike_along_their_line(model, rule, shares, floor, share):
    """Each has at least what the largest common target that can be paid gives it; targets are tried one by one."""
    budget = between(least_and_dense(model), share)

    def reached(number: int, rank: int | None) -> float:
        retention = price(model[number], rank) / price(model[number], None)
        if rule == "uniform" or retention <= floor:
            return retention
        return floor + (retention - floor) / max(shares[number], 1e-6)

    def at(target: float) -> list[int | None]:
        found = []
        for number, problem in enumerate(model):
            least, *more = choices(problem)
            fit = [rank for rank in more if reached(number, rank) <= target]
            best = min(lost(problem, rank) for rank in (least, *fit))
            found.append(next(rank for rank in (least, *fit) if lost(problem, rank) == best))
        return found

    targets = sorted({reached(number, rank) for number, x in enumerate(model) for rank in choices(x)})
    paid = [plan for plan in map(at, [-1.0, *targets]) if spent(model, plan) <= budget][-1]
    ranks = bought(model, rule, budget, shares=shares, floor=floor)
    assert all(lost(x, rank) <= lost(x, least) for x, rank, least in zip(model, ranks, paid, strict=True))


def test_uniform_on_many_equal_shapes_gives_the_textbook_rank():
    """k = retain · out · in / (out + in), rounded down, plus what rounding left over."""
    model = [shaped(linear(i, 64, 96), spectrum(64, i)) for i in range(20)]
    for retain in (0.2, 0.4, 0.6, 0.8):
        exact = retain * 64 * 96 / (64 + 96)
        ranks = bought(model, "uniform", int(retain * least_and_dense(model)[1]))
        assert set(ranks) <= {math.floor(exact), math.ceil(exact)}


def test_pivots_buy_rank():
    for retain, gain in ((0.6, 1.2), (0.8, 1.35)):
        plain, pivoted = (
            [shaped(linear(i, 512, 512), spectrum(512, i), pivoted=on) for i in range(3)] for on in (False, True)
        )
        budget = int(retain * least_and_dense(plain)[1])
        pairs = zip(bought(plain, "uniform", budget), bought(pivoted, "uniform", budget), strict=True)
        assert all(more > gain * rank for rank, more in pairs)


def grown(count: int = 12) -> Model:
    """Linears of two shapes, with 150 to 300 ranks, so that a step is small."""
    shapes = [(600, 300), (320, 400)]
    return [shaped(linear(i, *shapes[i % 2]), torch.ones(min(shapes[i % 2])).double()) for i in range(count)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.6, 1.4), min_size=12, max_size=12), st.sampled_from([0.1, 0.3]), st.floats(0.35, 0.65))
def test_retention_follows_the_papers_line(values, floor, target):
    """mrr + I (trr − mrr) with I of mean 1 by bytes, as long as nothing is clipped."""
    model = grown()
    sizes = np.array([price(problem, None) for problem in model])
    shares = np.array(values) * sizes.sum() / (np.array(values) * sizes).sum()
    ranks = bought(model, "adacr", int(target * sizes.sum()), shares=shares.tolist(), floor=floor)
    for problem, rank, share, size in zip(model, ranks, shares, sizes, strict=True):
        wanted = floor + share * (target - floor)
        assert abs(price(problem, rank) / size - wanted) <= 2 * price(problem, 1) / size


def test_what_is_clipped_is_shared_along_the_lines():
    model, shares = grown(6), (9.0, 0.5, 1.0, 2.0, 0.5, 1.0)
    first, *ranks = bought(model, "adacr", int(0.5 * least_and_dense(model)[1]), shares=shares, floor=0.2)
    assert first is None
    slopes = [
        (price(problem, rank) / price(problem, None) - 0.2) / share
        for problem, rank, share in zip(model[1:], ranks, shares[1:], strict=True)
    ]
    assert max(slopes) - min(slopes) < 0.03
    assert min(slopes) > 0.02


def test_a_floor_above_the_retention_is_uniform():
    model, shares = grown(6), (9.0, 0.5, 1.0, 2.0, 0.5, 1.0)
    budget = int(0.4 * least_and_dense(model)[1])
    uniform = bought(model, "uniform", budget)
    assert bought(model, "adacr", budget, shares=shares, floor=0.45) == uniform
    assert bought(model, "adacr", budget, shares=(1.0,) * 6, floor=0.2) == uniform
