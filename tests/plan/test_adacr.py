"""adaCR: importance of blocks against hidden states, a plan that follows it, refusals."""

import numpy as np
import pytest
import torch

import families
from helpers.samples import processor
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate
from spectrim.calibrate.data import load_data
from spectrim.errors import ModelError, NumericalError, RecipeError
from spectrim.pipeline import compression
from spectrim.plan.importance import block_cosines, importance


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
