"""adaCR: importance of blocks against hidden states, the line of retentions, exact budgets, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectrim.plan.allocate import choice, spend

import families
from helpers.plans import least_and_dense, linear, models, options, price, spent
from helpers.samples import processor
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate
from spectrim.calibrate.data import load_data
from spectrim.errors import ModelError, NumericalError, RecipeError
from spectrim.pipeline import compression
from spectrim.plan.importance import block_cosines, importance
from spectrim.recipe import AllocationPart


def ranks_of(model, shares, floor: float, budget: int):
    part = AllocationPart(rule="adacr", floor=floor)
    given = {name: torch.full((len(s),), shares[name], dtype=torch.float64) for name, (_, s) in model.items()}
    return spend({name: choice(part, one, given[name], None) for name, (one, _) in model.items()}, budget)


@settings(max_examples=200, deadline=None)
@given(models(), st.lists(st.sampled_from([0.0, 0.01, 0.5, 1.0, 1.3, 11.0]), min_size=5), st.floats(0, 0.9),
       st.floats(0, 1))  # fmt: skip
def test_budget_is_met_within_one_step(model, values, floor, share):
    """Whatever is clipped at dense goes to the others."""
    least, dense = least_and_dense(model)
    budget = int(least + share * (dense - least))
    ranks = ranks_of(model, dict(zip(model, values, strict=False)), floor, budget)
    assert ranks.keys() == model.keys()
    left = budget - spent(model, ranks)
    assert left >= 0
    for name, (one, _) in model.items():
        if (rank := ranks[name]) is not None:
            assert left < min(price(one, rank + 1), price(one, None)) - price(one, rank)


def grown(count: int = 12):
    """Linears of two shapes, with 150 to 300 ranks, so that a step is small."""
    shapes = [(600, 300), (320, 400)]
    return {f"l{i}": (linear(i, *shapes[i % 2]), torch.ones(min(shapes[i % 2]))) for i in range(count)}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.6, 1.4), min_size=12, max_size=12), st.sampled_from([0.1, 0.3]), st.floats(0.35, 0.65))
def test_retention_follows_the_papers_line(values, floor, target):
    """mrr + I (trr − mrr) with I of mean 1 by bytes, as long as nothing is clipped."""
    model = grown()
    sizes = np.array([one.nbytes for one, _ in model.values()])
    shares = np.array(values) * sizes.sum() / (np.array(values) * sizes).sum()
    ranks = ranks_of(model, dict(zip(model, shares, strict=True)), floor, int(target * sizes.sum()))
    for (name, (one, _)), share in zip(model.items(), shares, strict=True):
        wanted = floor + share * (target - floor)
        assert abs(price(one, ranks[name]) / one.nbytes - wanted) <= 2 * price(one, 1) / one.nbytes


def test_what_is_clipped_is_shared_along_the_lines():
    model = grown(6)
    shares = dict(zip(model, (9.0, 0.5, 1.0, 2.0, 0.5, 1.0), strict=True))
    ranks = ranks_of(model, shares, 0.2, int(0.5 * least_and_dense(model)[1]))
    assert ranks["l0"] is None
    slopes = [(price(one, ranks[name]) / one.nbytes - 0.2) / shares[name] for name, (one, _) in list(model.items())[1:]]
    assert max(slopes) - min(slopes) < 0.03
    assert min(slopes) > 0.02


def test_a_floor_above_the_retention_is_uniform():
    model = grown(6)
    budget = int(0.4 * least_and_dense(model)[1])
    shares = dict(zip(model, (9.0, 0.5, 1.0, 2.0, 0.5, 1.0), strict=True))
    assert ranks_of(model, shares, 0.45, budget) == spend(options(model, "uniform"), budget)
    same = dict.fromkeys(model, 1.0)
    assert ranks_of(model, same, 0.2, budget) == spend(options(model, "uniform"), budget)


def samples(model, family: str, words: str):
    sees = anatomy(model).tower is not None
    given = {"text": words, "images": "builtin", "samples": 3, "seqlen": 16, "seed": 0, "instruction": "Describe."}
    return load_data(model, processor(family), **given, sees=sees)


@pytest.mark.parametrize("family", ["llama", "llava"])
@torch.no_grad()
def test_cosines_are_those_of_the_hidden_states(family, words):
    """The hidden states that transformers itself hands out; all but the last block's are those of the blocks."""
    model = families.FAMILIES[family]()
    parts, data = anatomy(model), samples(model, family, words)
    found = block_cosines(model, parts, data)
    assert found.keys() == set(parts.blocks())
    cosines: dict[str, list[float]] = {}
    for modality in data.samples:
        for batch in data.batches(modality, 2):  # however they are batched
            inputs = batch.inputs
            states = {"backbone": model(**inputs, output_hidden_states=True).hidden_states}
            if modality == "image":
                tower = model.get_submodule(parts.tower)
                states["tower"] = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
            for place, layers in states.items():
                x, y = (layer.flatten(0, 1).double() for layer in layers[:2])
                shares = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
                cosines.setdefault(parts.blocks(place)[0], []).extend(shares.tolist())
    assert len(cosines) == (1 if family == "llama" else 2)
    for block, values in cosines.items():
        assert found[block] == pytest.approx(np.mean(values), rel=1e-5)


def test_importance_has_mean_one_by_bytes():
    parts = anatomy(families.FAMILIES["llava"]())
    cosines = {block: 0.3 + 0.1 * number for number, block in enumerate(parts.blocks())}
    for kind, raw in (("cos", lambda c: c), ("1-cos", lambda c: 1 - c)):
        found = importance(parts, cosines, kind)
        sizes = np.array([x.nbytes for x in parts.linears])
        assert np.average([found[x.name] for x in parts.linears], weights=sizes) == pytest.approx(1)
        inside = [x for x in parts.linears if x.block is not None]
        ratios = [found[x.name] / raw(cosines[x.block]) for x in inside]
        assert ratios == pytest.approx([ratios[0]] * len(inside))
        outside = [x for x in parts.linears if x.block is None]
        assert outside
        assert {found[x.name] for x in outside} == {1.0}


def test_importance_of_blocks_without_a_measure_or_a_share():
    parts = anatomy(families.FAMILIES["llava"]())
    tower, backbone = parts.blocks("tower"), parts.blocks("backbone")
    found = importance(parts, {backbone[0]: 0.5, backbone[1]: -0.2}, "cos")
    assert {found[x.name] for x in parts.linears if x.block in tower} == {1.0}
    assert {found[x.name] for x in parts.linears if x.block == backbone[1]} == {0.0}
    assert set(importance(parts, dict.fromkeys(backbone, 1.0), "1-cos").values()) == {1.0}


def test_a_plan_by_importance(words, tmp_path):
    model = families.FAMILIES["llava"]()
    given = {"processor": processor("llava"), "text": words, "samples": 4, "seqlen": 16}
    statistics = calibrate(model, tmp_path / "s", **given)
    changes = {"allocation.rule": "adacr", "allocation.importance": "1-cos", "allocation.floor": 0.2}
    parts = anatomy(model)
    with compression(model, "jw-svd", stats=statistics, processor=processor("llava"), changes=changes) as prepared:
        plan = prepared.plan(0.5)
        shares = importance(parts, prepared._cosines, "1-cos")
    assert 0 <= 0.5 * plan.dense_bytes - plan.bytes < max(4 * (x.out_features + x.in_features) for x in parts.linears)
    dense = [row.dense_bytes for row in plan.linears.values()]
    kept = [row.bytes for row in plan.linears.values()]
    wanted = [min(1.0, 0.2 + shares[name] * 0.3) for name in plan.linears]
    assert np.corrcoef(np.array(kept) / dense, wanted)[0, 1] > 0.9  # ranks are whole
    with (
        compression(model, "jw-svd", stats=statistics, changes=changes) as prepared,
        pytest.raises(RecipeError, match="'adacr' measures blocks on calibration samples; give statistics"),
    ):
        prepared.plan(0.5)


def test_what_cannot_be_measured_is_said(words):
    model = families.FAMILIES["llama"]()
    parts, data = anatomy(model), samples(model, "llama", words)
    for change, kind, message in (
        (lambda y: y * torch.nan, NumericalError, "the output of block model.layers.1 holds NaN"),
        (lambda y: y[..., :3], ModelError, "model.layers.1 changes the shape of what it reads"),
    ):
        handle = model.model.layers[1].register_forward_hook(lambda _m, _a, y, change=change: change(y))
        with pytest.raises(kind, match=message):
            block_cosines(model, parts, data)
        handle.remove()
        assert not any(module._forward_hooks for module in model.modules())
