"""Every rule with and without integers, from samples to a checkpoint, and on the linears that a recipe leaves free."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import families
from compressed import config_of, logits, low_rank
from helpers.plans import RULES, between
from helpers.samples import processor
from spectrim.anatomy import anatomy
from spectrim.checkpoint import load, read_provenance
from spectrim.errors import BudgetError, RecipeError
from spectrim.pipeline import compress, compression
from spectrim.pipeline.stages import Compression
from spectrim.plan.plan import Plan
from spectrim.recipe import FEED_FORWARD, Recipe
from spectrim.storage import DENSE, stored_layers

RETAIN = {None: 0.5, "auto": 0.2, 4: 0.11}


def stored_bytes(directory: Path, plan: Plan) -> int:
    """Of the compressible linears, in the file; biases not counted."""
    tensors = load_file(directory / "model.safetensors")
    return sum(
        tensor.nbytes
        for key, tensor in tensors.items()
        if any(key.startswith(f"{name}.") for name in plan.linears) and not key.endswith(".bias")
    )


@pytest.mark.parametrize("bits", RETAIN)
@pytest.mark.parametrize("rule", RULES)
def test_from_samples_to_a_checkpoint(rule, bits, calibrated, tmp_path):
    model, statistics = calibrated["llama"]
    changes, retain = {"allocation.rule": rule, "quantize.bits": bits}, RETAIN[bits]
    with compression(model, "curvature", stats=statistics, processor=processor("llama"), changes=changes) as prepared:
        plan = prepared.plan(retain)
        prepared.save(plan, tmp_path / "small")
        with prepared.applied(plan) as small:
            expected = logits(small)
    assert not stored_layers(model)
    assert stored_bytes(tmp_path / "small", plan) == plan.bytes <= retain * plan.dense_bytes
    assert plan.bytes > 0.95 * retain * plan.dense_bytes
    assert torch.equal(logits(load(tmp_path / "small")), expected)
    assert Plan.read(tmp_path / "small" / "plan.json").linears == plan.linears
    kinds = {row.form for row in plan.linears.values()}
    if bits is None:
        assert kinds <= {DENSE, "low-rank"}
    elif bits == "auto":
        assert kinds & {"integers", "integer-factors", "integers+factors"}
    else:
        assert kinds <= {"integers", "integer-factors"}
        grids = [g for row in plan.linears.values() for g in row.spec.get("grids", {"": row.spec}).values()]
        assert {grid["bits"] for grid in grids} == {bits}


@pytest.mark.parametrize(
    ("recipe", "retain", "changes"),
    [
        ("jw-svd+gptq", 0.2, {}),
        ("svd", 0.25, {"quantize.bits": 4, "quantize.symmetric": False, "quantize.group": 32}),
        ("curvature+gptq", 0.15, {"quantize.method": "rtn"}),
        ("laser+gptq", 0.4, {}),
        ("asvd", 0.3, {"quantize.bits": 8}),
        ("curvature+gptq", 0.6, {"storage.pivoted": True}),
        ("svd", 0.09, {"quantize.bits": 4, "storage.multiple": 16}),
        ("svd", 0.6, {"storage.multiple": 8}),
    ],
)
def test_recipes_in_one_call(recipe, retain, changes, calibrated, tmp_path):
    """The plan that was written, obeyed again, gives the same model, and the dense one comes back after the block."""
    families.FAMILIES["llama"]().save_pretrained(tmp_path / "dense")
    statistics = None if recipe == "svd" else calibrated["llama"][1]
    small = compress(
        load(tmp_path / "dense"), tmp_path / "small", stats=statistics, retain=retain, recipe=recipe, changes=changes
    )
    model = load(tmp_path / "dense")
    parts, before = anatomy(model), logits(model)
    plan = Plan.read(tmp_path / "small" / "plan.json", parts)
    assert stored_bytes(tmp_path / "small", plan) == plan.bytes <= retain * plan.dense_bytes
    assert read_provenance(tmp_path / "small")["retention"]["bytes"] == plan.bytes / plan.dense_bytes
    integers = any("integer" in row.form for row in plan.linears.values())
    assert integers == (config_of(tmp_path / "small")["quantization_config"]["inner"] is not None)
    assert integers == ("quantize.bits" in changes or "gptq" in recipe)
    if recipe == "laser+gptq":
        roles = {x.role for x in parts.linears if plan.linears[x.name].form not in (DENSE, "low-rank")}
        assert roles
        assert roles <= set(FEED_FORWARD)
    assert torch.equal(logits(load(tmp_path / "small")), logits(small))
    with compression(model, recipe, stats=statistics, changes=changes) as prepared:
        with prepared.applied(plan) as again:
            assert torch.equal(logits(again), logits(small))
        assert torch.equal(logits(model), before)
    assert not stored_layers(model)
    if multiple := changes.get("storage.multiple"):
        ranks = [layer.rank for layer in low_rank(small).values()]
        assert ranks
        assert all(rank % multiple == 0 for rank in ranks)
        plain = compress(model, recipe=recipe, retain=retain, changes=changes | {"storage.multiple": 1})
        assert any(layer.rank % multiple for layer in low_rank(plain).values())


# ---- recipes of all kinds, on the linears that they leave free ----

_PREPARED: dict[tuple, Compression] = {}


def prepared_for(calibrated, places: tuple[str, ...], changes: dict) -> Compression:
    """One compression for each recipe; its statistics stay, so that it can be asked after the block."""
    key = (places, *changes.items())
    if key not in _PREPARED:
        model, statistics = calibrated["llava"]
        chosen = changes | {"allocation.places": list(places)}
        with compression(model, "curvature", stats=statistics, processor=processor("llava"), changes=chosen) as found:
            _PREPARED[key] = found
    return _PREPARED[key]


PLACES = st.sampled_from([("backbone",), ("tower", "connector", "backbone"), ("tower",), ("connector", "backbone")])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rule=st.sampled_from(RULES),
    places=PLACES,
    changes=st.fixed_dictionaries(
        {
            "storage.multiple": st.sampled_from([1, 8, 64]),
            "storage.pivoted": st.booleans(),
            "quantize.bits": st.sampled_from([None, 2, 4, "auto"]),
            "quantize.roles": st.sampled_from(["all", "feed-forward"]),
            "metric.per_head": st.booleans(),
            "metric.modality": st.sampled_from(["text", "joint"]),
        }
    ),
    share=st.floats(0, 1),
)
def test_budgets_are_met_on_what_is_free(rule, places, changes, share, calibrated):
    places = ("backbone",) if rule == "sensitivity" else places
    changes = {**changes, "allocation.rule": rule}
    if "backbone" not in places and changes["metric.modality"] == "text":
        changes["metric.modality"] = "joint"  # text reaches no tower
    found = prepared_for(calibrated, places, changes)
    free = [x for x in found.parts.linears if x.place in places and x.name not in found.unreached]
    menus = found.maker.menus(free)
    dense = sum(x.nbytes for x in found.parts.linears)
    frozen = dense - sum(x.nbytes for x in free)
    least, most = (frozen + sum(int(end(x.bytes)) for x in menus.values()) for end in (min, max))
    plan = found.plan(min(1.0, (between((least, most), share) + 0.5) / dense))
    left = int(plan.retain * dense) - plan.bytes
    assert left >= 0
    assert list(plan.linears) == [x.name for x in found.parts.linears]
    assert all(row.form == DENSE for name, row in plan.linears.items() if name not in menus)
    for name, offered in menus.items():
        row = plan.linears[name]
        now = next(n for n in range(len(offered.bytes)) if offered.option(n) == (row.form, row.spec))
        assert row.bytes == offered.bytes[now]
        assert row.error == offered.error[now] / max(offered.left[0], 1e-300)
        better = offered.error < min(offered.error[now], offered.left[0]) * (1 - 1e-9)  # than nothing, too
        assert not (better & (offered.bytes - offered.bytes[now] <= left)).any()
    with pytest.raises(BudgetError, match=r"raise (the retention or name|--retain)"):
        found.plan((least - 0.5) / dense)


def test_what_stays_dense_counts_at_its_full_size(calibrated):
    model, statistics = calibrated["llava"]
    changes = {"allocation.places": ["backbone"], "quantize.bits": "auto"}
    with compression(model, "jw-svd", stats=statistics, changes=changes) as prepared:
        plan = prepared.plan(0.7)
        kept = sum(x.nbytes for x in prepared.parts.linears if x.place != "backbone")
        with pytest.raises(
            BudgetError,
            match=rf"linears stay dense \(outside backbone\) and take {kept} bytes, of which there are .*; raise",
        ):
            prepared.plan(0.9 * kept / plan.dense_bytes)
    assert kept < plan.bytes <= 0.7 * plan.dense_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compensate.kind": "adacomp"}, "no integers"),
        ({"quantize.bits": 5}, r"quantize\.bits"),
        ({"quantize.group": 48}, r"quantize\.group"),
        ({"allocation.rule": "best"}, r"allocation\.rule"),
        ({"storage.multiple": 0}, r"storage\.multiple"),
        ({"allocation.rule": "loss-aware"}, "needs predicted losses"),
    ],
)
def test_recipes_that_cannot_be(changes, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.read("jw-svd+gptq", changes)
