"""MLPs with fewer units from end to end: planned, made, compensated, written, loaded, and made dense again."""

from functools import partial

import pytest
import torch

from compressed import logits
from helpers.samples import processor
from helpers.streams import batches
from spectrim.anatomy import anatomy
from spectrim.checkpoint import load
from spectrim.errors import BudgetError
from spectrim.maths.rounding import error
from spectrim.pipeline import compress, compression
from spectrim.plan.plan import Plan, plan_row
from spectrim.plan.units import units_of
from spectrim.recipe import Recipe

NARROW = {"storage.narrow": True, "compensate.kind": "none"}


def narrowed(prepared, share: float, bits: int | None = None) -> Plan:
    """All that the model has MLPs for at a share of their units, in floats or integers, all else dense."""
    parts, rows = prepared.parts, {}
    grid = {} if bits is None else {"grid": {"bits": bits, "group": None, "symmetric": True}}
    for reader, first in units_of(parts.linears, prepared.model).items():
        count = int(share * parts.linear(reader).in_features)
        rows[reader] = plan_row(parts.linear(reader), "narrow", {"inputs": count} | grid)
        rows |= {name: plan_row(parts.linear(name), "narrow", {"outputs": count} | grid) for name in first}
    assert rows
    return Plan(recipe="spectrim", linears=rows).fitted(parts)


def rise(prepared, plan: Plan, inputs, wanted) -> float:
    with prepared.applied(plan) as small, torch.no_grad():
        pairs = zip(inputs, wanted, strict=True)
        return sum(float((small(**batch).logits - y).square().sum()) for batch, y in pairs)


def as_it_was(model, make, linear, row):
    """The stored tensors of a linear, its columns not fitted again."""
    tensors = dict(make(linear, row))
    if "inputs" in row.spec:
        tensors["N.weight"] = model.get_submodule(linear.name).weight.detach()[:, tensors["units"].long()]
    return tensors


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["llama", "llava"])
def test_a_model_with_narrower_mlps_from_end_to_end(family, bits, calibrated, tmp_path):
    model, statistics = calibrated[family]
    model.save_pretrained(tmp_path / "dense")
    given = {"stats": statistics, "processor": processor(family), "changes": {"storage.narrow": True}}
    with compression(load(tmp_path / "dense"), "spectrim", **given) as prepared:
        plan = narrowed(prepared, 0.75, bits)
    (tmp_path / "plan.json").write_text(plan.json())
    small = compress(load(tmp_path / "dense"), tmp_path / "small", plan=tmp_path / "plan.json", **given)
    loaded = load(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(small))
    held = {key: tensor.nbytes for key, tensor in loaded.state_dict().items() if not key.endswith(".bias")}
    assert sum(size for key, size in held.items() if any(key.startswith(f"{x}.") for x in plan.linears)) == plan.bytes
    before = logits(loaded)
    loaded.dequantize()
    torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-4)


def test_what_an_mlp_loses_is_what_its_reader_loses(calibrated):
    """Units that are not read cost nothing, so that the loss is that of the reader on the inputs of the dense model."""
    model, statistics = calibrated["llama"]
    with compression(model, "spectrim", stats=statistics, processor=processor("llama"), changes=NARROW) as prepared:
        plan = narrowed(prepared, 0.5)
        expected = 0.0
        for reader in units_of(prepared.parts.linears):
            problem = prepared.maker.problem(prepared.parts.linear(reader))
            W = prepared.maker.make(problem.linear, plan.linears[reader])
            E = problem.W.double().index_add(1, W["units"].long(), -W["N.weight"].double())
            expected += error(E, problem.C, problem.G)
            count = len(W["units"])
            ridge = problem.ridge * float(problem.C.diagonal().mean())
            priced = error(E, problem.C, problem.G) + ridge * error(E, None, problem.G)
            assert float(problem.removal.error[-count - 1]) == pytest.approx(priced, rel=1e-4)
        assert prepared.predicted(plan)["text"] == pytest.approx(expected, rel=0.05)  # G is dampened in one of them


def test_fitting_the_reader_again_and_compensation_pay(calibrated, words):
    model, statistics = calibrated["llama"]
    inputs = [batch for _, batch in batches(model, "llama", words)]
    with torch.no_grad():
        wanted = [model(**batch).logits for batch in inputs]
    found = {}
    for kind in ("none", "anchored"):
        changes = NARROW | {"compensate.kind": kind, "compensate.weight": 1.0}
        with compression(
            model, "spectrim", stats=statistics, processor=processor("llama"), changes=changes
        ) as prepared:
            plan = narrowed(prepared, 0.5)
            found[kind] = rise(prepared, plan, inputs, wanted)
            if kind == "none":
                prepared.maker.make = partial(as_it_was, model, prepared.maker.make)
                found["as it was"] = rise(prepared, plan, inputs, wanted)
    assert found["anchored"] < found["none"] < found["as it was"]


def test_the_allocation_takes_units_where_that_is_predicted_to_cost_less(calibrated):
    model, statistics = calibrated["llama"]
    with compression(model, "spectrim", stats=statistics, processor=processor("llama"), changes=NARROW) as prepared:
        plans = {retain: prepared.plan(retain) for retain in (0.9, 0.5, 0.2)}
        kinds = [(row.form, row.spec) for plan in plans.values() for row in plan.linears.values()]
        assert all(plan.bytes <= retain * plan.dense_bytes for retain, plan in plans.items())
        for plan in plans.values():
            for reader, first in units_of(prepared.parts.linears).items():
                rows = [plan.linears[name] for name in (*first, reader)]
                assert len({row.form == "narrow" for row in rows}) == 1
                assert len({n for row in rows for n in row.spec.values() if row.form == "narrow"}) <= 1
    assert any(form == "narrow" for form, _ in kinds)
    without = {"compensate.kind": "none"}
    with compression(model, "spectrim", stats=statistics, processor=processor("llama"), changes=without) as prepared:
        for retain, plan in plans.items():
            assert plan.loss <= prepared.plan(retain).loss * 1.01


def test_plans_whose_units_do_not_agree_are_refused(calibrated):
    model, statistics = calibrated["llama"]
    with compression(model, "spectrim", stats=statistics, processor=processor("llama"), changes=NARROW) as prepared:
        plan = narrowed(prepared, 0.5)
        reader, (first, *_) = next(iter(units_of(prepared.parts.linears).items()))
        rows = plan.linears | {reader: plan_row(prepared.parts.linear(reader))}
        with pytest.raises(BudgetError, match=f"units to '{first}' and has .* read by '{reader}'; give both"):
            Plan(recipe="spectrim", linears=rows).fitted(anatomy(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation.rule": "uniform"},
        {"allocation.rule": "global-energy", "quantize.bits": "auto"},
        {"compensate.kind": "adacomp"},
        {"quantize.bits": 4, "quantize.format": "compressed-tensors"},
        {"storage.narrow": False},
    ],
)
def test_units_stay_where_nothing_compares_or_fits_or_stores_them(changes, calibrated):
    """The default recipe has narrower MLPs; what is changed of it alone goes on working."""
    model, statistics = calibrated["llama"]
    assert Recipe.read("spectrim").stored.narrow
    with compression(model, "spectrim", stats=statistics, processor=processor("llama"), changes=changes) as prepared:
        plan = prepared.plan(0.5)
        assert "narrow" not in {row.form for row in plan.linears.values()}
        with prepared.applied(plan):
            pass
