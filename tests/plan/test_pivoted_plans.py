"""Budgets, plans and whole compressions with pivoted storage."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from spectrim.plan.allocate import choice, spend

import families
from compressed import config_of, logits, low_rank
from helpers.plans import PIVOTED_RULES, PivotedModel, linear, pivoted_models, pivoted_price, spectrum
from spectrim.anatomy import anatomy
from spectrim.checkpoint import load, read_provenance
from spectrim.errors import BudgetError
from spectrim.linear import Linear
from spectrim.pipeline import compress, compression
from spectrim.plan.plan import Plan, pays_by_pivots, plan_row
from spectrim.recipe import AllocationPart, Recipe, builtin_names

PIVOTED = {"storage.pivoted": True}


def bought(model: PivotedModel, rule: str, budget: int) -> dict[str, int | None]:
    part = AllocationPart(rule=rule)
    return spend({one.name: choice(part, one, s, s, pivoted=True) for one, s in model}, budget)


def least_and_dense(model: PivotedModel) -> tuple[int, int]:
    dense = [pivoted_price(one, None) for one, _ in model]
    return sum(min(pivoted_price(one, 1), most) for (one, _), most in zip(model, dense, strict=True)), sum(dense)


@settings(max_examples=300, deadline=None)
@given(pivoted_models(), st.sampled_from(PIVOTED_RULES), st.floats(0, 1))
def test_budget_is_met_within_one_step(model, rule, share):
    least, dense = least_and_dense(model)
    budget = int(least + share * (dense - least))
    ranks = bought(model, rule, budget)
    left = budget - sum(pivoted_price(one, ranks[one.name]) for one, _ in model)
    assert left >= 0
    for one, _ in model:
        if (rank := ranks[one.name]) is not None:
            assert pivoted_price(one, rank) < pivoted_price(one, None)
            assert left < min(pivoted_price(one, rank + 1), pivoted_price(one, None)) - pivoted_price(one, rank)
    assert set(bought(model, rule, dense).values()) == {None}


@given(pivoted_models(), st.sampled_from(PIVOTED_RULES))
def test_less_than_rank_one_everywhere_is_refused(model, rule):
    least, _ = least_and_dense(model)
    bought(model, rule, least)
    with pytest.raises(BudgetError, match=f"less than the {least} bytes"):
        bought(model, rule, least - 1)


# ---- loss-aware against every possible plan ----


def rows(one: Linear, loss: torch.Tensor) -> list[tuple[int, float]]:
    """Bytes and predicted loss of every choice for one linear."""
    counted = [(pivoted_price(one, n), float(loss[n:].sum())) for n in range(1, len(loss) + 1)]
    return [*counted, (pivoted_price(one, None), 0.0)]


def plans(model: PivotedModel) -> np.ndarray:
    found = itertools.product(*(rows(*each) for each in model))
    return np.array([(sum(size for size, _ in plan), sum(loss for _, loss in plan)) for plan in found])


def loss_of(model: PivotedModel, budget: int) -> float:
    ranks = bought(model, "loss-aware", budget)
    return sum(float(loss[rank:].sum()) for one, loss in model if (rank := ranks[one.name]) is not None)


def hull(model: PivotedModel) -> list[tuple[float, int, float]]:
    """Segments (loss per byte, bytes, loss) of the pooled lower hull, steepest first; from the points themselves."""
    segments = []
    for each in model:
        points = sorted(rows(*each))
        at = points[0]
        while later := [point for point in points if point[0] > at[0] and point[1] <= at[1]]:
            best = min(later, key=lambda point: ((point[1] - at[1]) / (point[0] - at[0]), -point[0]))
            segments.append(((at[1] - best[1]) / (best[0] - at[0]), best[0] - at[0], at[1] - best[1]))
            at = best
    return sorted(segments, key=lambda segment: -segment[0])


@settings(max_examples=200, deadline=None)
@given(pivoted_models(9, 3), st.floats(0, 1))
def test_no_plan_is_better_by_more_than_a_segment_of_the_hull(model, share):
    least, dense = least_and_dense(model)
    budget = int(least + share * (dense - least))
    every = plans(model)
    best = every[every[:, 0] <= budget, 1].min()
    assert best - 1e-9 <= loss_of(model, budget) <= best + max((gain for _, _, gain in hull(model)), default=0.0) + 1e-9


@settings(max_examples=150, deadline=None)
@given(pivoted_models(9, 3))
def test_no_plan_is_better_where_the_hull_has_one_vertex(model):
    """At the ends of runs of equally steep segments, whose order is free."""
    every, (spent, _), segments = plans(model), least_and_dense(model), hull(model)
    for (slope, size, _), after in itertools.zip_longest(segments, segments[1:]):
        spent += size
        if after is None or after[0] < slope - 1e-9:
            assert loss_of(model, spent) == pytest.approx(every[every[:, 0] <= spent, 1].min(), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(pivoted_models(9, 3))
def test_more_budget_never_costs_loss(model):
    least, dense = least_and_dense(model)
    losses = [loss_of(model, budget) for budget in range(least, dense + 5, 2)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(losses))
    assert losses[-1] == 0


def test_directions_that_get_cheaper_are_bought_together():
    """Of equal directions the later ones cost less, so that all are worth it, or none."""
    model = [(linear(number, 40, 60), torch.ones(40).double()) for number in range(2)]
    _, dense = least_and_dense(model)
    ranks = bought(model, "loss-aware", dense // 2 + pivoted_price(model[0][0], 1))
    assert sorted(rank or 40 for rank in ranks.values())[0] < 3


def test_pivots_buy_rank():
    for retain, gain in ((0.6, 1.2), (0.8, 1.35)):
        model = [(linear(i, 512, 512), spectrum(512, i)) for i in range(3)]
        budget = int(retain * least_and_dense(model)[1])
        part = AllocationPart(rule="uniform")
        plain = spend({one.name: choice(part, one, s, None) for one, s in model}, budget)
        ranks = bought(model, "uniform", budget)
        assert all(ranks[name] > gain * rank for name, rank in plain.items())


# ---- plans and compressions ----


def test_pivots_pay_from_the_rank_at_which_they_spare_more_than_their_indices():
    half, single = linear(0, 9, 12), linear(0, 9, 12, torch.float32)
    assert [pays_by_pivots(half, rank) for rank in (1, 2, 3, 8, 9)] == [False, False, True, True, False]
    assert [pays_by_pivots(single, rank) for rank in (1, 2, 8)] == [False, True, True]
    assert not pays_by_pivots(half, None)
    assert not pays_by_pivots(half, (3, 3, 3))


def test_edited_pivots_are_obeyed_or_refused(parts, tmp_path):
    first, second = parts.linears[:2]
    q = next(x for x in parts.linears if x.role == "q")
    plan = Plan(recipe="svd", linears={first.name: plan_row(first, 7, pivoted=True), second.name: plan_row(second, 5)})
    path = tmp_path / "plan.json"

    def read(**changes) -> Plan:
        content = json.loads(plan.json())
        content["linears"][first.name].update(changes)
        path.write_text(json.dumps(content))
        return Plan.read(path, parts)

    out, size = first.out_features, first.in_features
    assert read().pivoted == {first.name}
    assert read().linears[first.name].bytes == 4 * 7 * (size + out - 7) + 4 * 7
    assert read(rank=9).linears[first.name].bytes == 4 * 9 * (size + out - 9) + 4 * 9
    assert read(pivoted=False).linears[first.name].bytes == 4 * 7 * (size + out)
    dense = read(rank=None)
    assert dense.pivoted == set()
    assert dense.linears[first.name].bytes == first.nbytes
    with pytest.raises(BudgetError, match=f"stores '{first.name}' by pivots, which needs one rank below its {out}"):
        read(rank=out)
    headed = plan.model_copy(update={"linears": {q.name: plan_row(q, (3,) * q.heads)}})
    broken = json.loads(headed.json())
    broken["linears"][q.name]["pivoted"] = True
    path.write_text(json.dumps(broken))
    with pytest.raises(BudgetError, match=f"stores '{q.name}' by pivots, which needs one rank"):
        Plan.read(path, parts)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compression_from_end_to_end(family, dtype, tmp_path):
    families.FAMILIES[family]().to(dtype).save_pretrained(tmp_path / "dense")
    dense = load(tmp_path / "dense")
    linears = anatomy(dense).linears
    small = compress(dense, tmp_path / "small", recipe="svd", retain=0.6, changes=PIVOTED)
    layers = low_rank(small)
    assert all(layer.pivots is not None for layer in layers.values())
    loaded = load(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(small))
    assert {str(layer.pivots.dtype) for layer in low_rank(loaded).values()} == {"torch.int32"}
    assert {layer.pivots.dtype for layer in low_rank(load(tmp_path / "small", dtype=torch.float16)).values()} == {
        torch.int32
    }
    # Bytes of the plan are those of the file.
    names = config_of(tmp_path / "small")["quantization_config"]
    assert names["pivoted"] == sorted(names["ranks"])
    kinds = (".A.weight", ".B.weight", ".pivots")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    stored = {key: t.nbytes for key, t in tensors.items() if key.endswith(kinds)}
    kept = sum(x.nbytes for x in linears if x.name not in layers)
    plan = Plan.read(tmp_path / "small" / "plan.json", anatomy(load(tmp_path / "dense")))
    assert plan.pivoted == layers.keys()
    assert sum(stored.values()) + kept == plan.bytes <= 0.6 * plan.dense_bytes
    record = read_provenance(tmp_path / "small")
    numbers = sum(t.numel() for key, t in tensors.items() if key.endswith(kinds[:2])) + kept // dtype.itemsize
    assert record["retention"]["params"] == pytest.approx(numbers / sum(x.params for x in linears))
    assert record["recipe"]["storage"] == {"pivoted": True, "multiple": 1}
    # The same plan, obeyed by another recipe.
    again = compress(load(tmp_path / "dense"), recipe="jw-svd", plan=plan, changes={"metric.kind": "identity"})
    assert torch.equal(logits(again), logits(small))


def test_a_model_is_dense_again_after_the_block():
    model = families.FAMILIES["llama"]()
    before = logits(model)
    with compression(model, "svd", changes=PIVOTED) as prepared:
        with prepared.applied(prepared.plan(0.5)) as small:
            assert any(layer.pivots is not None for layer in low_rank(small).values())
        plain = prepared.plan(1.0)
    assert torch.equal(logits(model), before)
    assert plain.pivoted == set()


def test_storage_is_a_part_of_every_recipe():
    for name in builtin_names():
        assert Recipe.read(name).storage.pivoted == (name == "spectrim")
        assert Recipe.read(name, PIVOTED).storage.pivoted
        assert not Recipe.read(name, {"storage.pivoted": False}).storage.pivoted
