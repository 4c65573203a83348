"""Compensation of plans that hold integers: one walk for factors, integers, and both together."""

import pytest
import torch
from spectrim.storage.make import Stored, make_stored

import families
from compressed import logits
from helpers.matrices import metric, normal
from helpers.samples import processor
from helpers.streams import batches, prepare
from spectrim.anatomy import anatomy
from spectrim.checkpoint import load
from spectrim.compensate import run
from spectrim.errors import RecipeError
from spectrim.maths.rounding import Grid, error, quantize
from spectrim.pipeline import compress, compression
from spectrim.plan.plan import Integers, Plan, plan_row
from spectrim.recipe import Recipe

AUTO = {"quantize.bits": "auto"}


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_the_flagship_with_bits_from_end_to_end(family, words, tmp_path, monkeypatch):
    model, statistics = prepare(family, words, tmp_path / "s")
    model.save_pretrained(tmp_path / "dense")
    given = {"stats": statistics, "processor": processor(family), "changes": AUTO | {"compensate.samples": 8}}
    small = compress(model, tmp_path / "small", retain=0.4, **given)
    loaded, dense = load(tmp_path / "small"), load(tmp_path / "dense")
    assert torch.equal(logits(loaded), logits(small))
    plan = Plan.read(tmp_path / "small" / "plan.json", anatomy(dense))
    assert plan.bytes <= 0.4 * plan.dense_bytes
    assert any(row.integers is not None for row in plan.linears.values())
    held = {key: tensor.nbytes for key, tensor in loaded.state_dict().items() if not key.endswith(".bias")}
    assert sum(size for key, size in held.items() if any(key.startswith(f"{x}.") for x in plan.linears)) == plan.bytes
    # What is solved lies on disk and is not solved again.
    monkeypatch.setattr(run.Compensation, "_solve", None)
    with compression(dense, **given) as prepared, prepared.applied(plan) as again:
        assert torch.equal(logits(again), logits(small))


@pytest.mark.parametrize("recipe", ["svd-llm", "curvature"])
def test_integers_answer_to_what_the_layers_before_them_became(recipe, words, calibrated):
    """Nearer to the dense model on the calibration samples than each linear by itself."""
    model, statistics = calibrated["llama"]
    found = {}
    for kind in ("none", "anchored"):
        changes = {"quantize.bits": 3, "compensate.kind": kind, "compensate.weight": 1.0}
        given = {"stats": statistics, "processor": processor("llama"), "changes": changes}
        with compression(model, recipe, **given) as prepared:
            plan = prepared.plan(0.15)
            assert {row.integers is not None for row in plan.linears.values()} == {True}
            inputs = [batch for _, batch in batches(model, "llama", words)]
            with torch.no_grad():
                wanted = [model(**batch).logits for batch in inputs]
                with prepared.applied(plan) as small:
                    pairs = zip(inputs, wanted, strict=True)
                    found[kind] = sum(float((small(**batch).logits - y).square().sum()) for batch, y in pairs)
    assert found["anchored"] < 0.9 * found["none"]


def test_linears_before_any_change_have_the_integers_that_they_have_alone(calibrated):
    model, statistics = calibrated["llama"]
    changes = {"quantize.bits": 4, "compensate.kind": "anchored", "compensate.samples": 12}
    with compression(model, "svd-llm", stats=statistics, processor=processor("llama"), changes=changes) as prepared:
        plan = prepared.plan(0.2)
        found, name = prepared._compensated(plan), prepared.parts.linears[0].name
        alone = prepared._stored(name, plan.linears[name]).weight()
        # Moments that were summed in another order turn a few codes.
        assert float((found[name].weight() - alone).norm() / alone.norm()) < 0.02


def test_refinement_leaves_integers_alone(calibrated):
    model, statistics = calibrated["llama"]
    given = {"stats": statistics, "processor": processor("llama")}
    parts = anatomy(model)
    rows = {
        x.name: plan_row(
            x, 4, integers=None if x.role == "o" else Integers(residual=3) if x.role == "up" else Integers(bits=4)
        )
        for x in parts.linears
    }
    plan, weights = Plan(recipe="svd-llm", linears=rows), {}
    for steps in (0, 8):
        changes = {"compensate.kind": "anchored", "compensate.refine": steps}
        with compression(model, "svd-llm", **given, changes=changes) as prepared:
            weights[steps] = {name: found.weight() for name, found in prepared._compensated(plan).items()}
    first = {x.name for x in parts.linears if x.block == parts.linears[0].block}
    moved = {name for name in first if not torch.equal(weights[0][name], weights[8][name])}
    assert moved == {x.name for x in parts.linears if x.name in first and x.role in ("o", "up")}


def test_what_is_stored_comes_back_from_tensors():
    linear = anatomy(families.FAMILIES["llama"]()).linears[0]
    W = normal(linear.out_features, linear.in_features)
    C, kinds = metric(linear.in_features), [None, Integers(bits=4), Integers(residual=3), Integers(bits=8, residual=4)]
    for how in [*kinds, Integers(bits=3, symmetric=False, group=32)]:
        for rank in (None, 3):
            if rank is None and (how is None or how.residual is not None):
                continue
            found = make_stored(W, linear, plan_row(linear, rank, integers=how), C, None)
            again = Stored.from_tensors(found.tensors())
            assert again.parts.keys() == found.parts.keys()
            assert torch.equal(again.weight(), found.weight())
            assert again.tensors().keys() == found.tensors().keys()
    grid = Grid(4, None)
    torch.testing.assert_close(Stored({"": quantize(W, grid)}).weight(), quantize(W, grid).dense())


def test_adacomp_refuses_integers(calibrated):
    with pytest.raises(RecipeError, match="adaComp fits factors that are no integers"):
        Recipe.read("adasvd", {"quantize.bits": 4})
    model, statistics = calibrated["llama"]
    linears = {x.name: plan_row(x, None, integers=Integers(bits=4)) for x in anatomy(model).linears}
    with (
        compression(model, "adasvd", stats=statistics, processor=processor("llama")) as prepared,
        pytest.raises(RecipeError, match="adaComp fits factors that are no integers"),
    ):
        prepared.apply(Plan(recipe="adasvd", linears=linears))


def test_damping_trades_what_samples_show_for_what_they_do_not():
    """Little damping: the least error in the metric. Much damping: that of rounding each entry by itself."""
    linear = anatomy(families.FAMILIES["llama"]()).linears[0]
    W = normal(linear.out_features, linear.in_features)
    C, row = metric(linear.in_features, decay=1.0), plan_row(linear, None, integers=Integers(bits=3))
    found = [W - make_stored(W, linear, row, C, None, damping=d).weight() for d in (1e-3, 0.1, 10.0)]
    shown, all_over = [error(E, C) for E in found], [error(E) for E in found]
    assert shown == sorted(shown)
    assert all_over == sorted(all_over, reverse=True)
    nearest = W - make_stored(W, linear, row, C, None, damping=None).weight()
    assert error(found[0], C) < 0.9 * error(nearest, C)
