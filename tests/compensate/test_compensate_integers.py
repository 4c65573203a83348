"""Compensation of plans that hold integers: one walk for factors, integers, and both together."""

import pytest
import torch
from torch import nn

import families
from compressed import logits
from helpers.matrices import metric, normal
from helpers.samples import processor
from helpers.streams import batches, prepare
from spectrim.anatomy import anatomy
from spectrim.checkpoint import load
from spectrim.compensate import run
from spectrim.compensate.store import Store
from spectrim.errors import RecipeError
from spectrim.maths.rounding import error
from spectrim.pipeline import compress, compression
from spectrim.plan import maker
from spectrim.plan.plan import Plan, plan_row
from spectrim.recipe import QuantizePart, Recipe, StoragePart
from spectrim.storage import Problem, filled, forms, made

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
    assert {row.form for row in plan.linears.values()} & {"integers", "integer-factors", "integers+factors"}
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
            assert {row.form for row in plan.linears.values()} <= {"integers", "integer-factors"}
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
        found, linear = prepared._compensated(plan), prepared.parts.linears[0]
        row, dense = plan.linears[linear.name], model.get_submodule(linear.name)
        both = (found[linear.name], prepared.maker.make(linear, row))
        W, alone = (filled(dense, row.form, row.spec, tensors).product() for tensors in both)
        # Moments that were summed in another order turn a few codes.
        assert float((W - alone).norm() / alone.norm()) < 0.02


def test_refinement_leaves_integers_alone(calibrated):
    model, statistics = calibrated["llama"]
    given = {"stats": statistics, "processor": processor("llama")}
    parts = anatomy(model)
    grid = {"bits": 4, "group": None, "symmetric": True}
    forms = {
        "o": ("low-rank", {"rank": 4}),
        "up": ("integers+factors", {"rank": 4, "grids": {"R": grid | {"bits": 3}}}),  # beside factors of floats
        None: ("integer-factors", {"rank": 4, "grids": {"A": grid, "B": grid}}),
    }
    rows = {x.name: plan_row(x, *forms.get(x.role, forms[None])) for x in parts.linears}
    plan, weights = Plan(recipe="svd-llm", linears=rows), {}
    for steps in (0, 8):
        changes = {"compensate.kind": "anchored", "compensate.refine": steps}
        with compression(model, "svd-llm", **given, changes=changes) as prepared:
            weights[steps] = prepared._compensated(plan)
    first = [x for x in parts.linears if x.block == parts.linears[0].block]
    moved = {
        (x.role, key)
        for x in first
        for key, tensor in weights[8][x.name].items()
        if not torch.equal(tensor, weights[0][x.name][key])
    }
    assert moved == {(role, f"{part}.weight") for role in ("o", "up") for part in "AB"}


def test_units_of_any_form_come_back_from_disk(calibrated):
    """Whole, by name and by tensor, in the dtypes that they have."""
    model, statistics = calibrated["llama"]
    four = {"bits": 4, "group": None, "symmetric": False}
    specs = {
        "dense": {},
        "integers": four,
        "low-rank": {"rank": 3, "pivoted": True},
        "integer-factors": {"rank": 3, "grids": {"A": four, "B": four}},
        "integers+factors": {"rank": 3, "grids": {"R": four}},
        "narrow": {"inputs": 3},
    }
    assert specs.keys() == {form.name for form in forms() if form.replaces is nn.Linear}
    with compression(model, "spectrim", stats=statistics, processor=processor("llama")) as prepared:
        reader = next(x for x in prepared.parts.linears if x.role == "down")  # units are those of an MLP
        linears = [*prepared.parts.linears[: len(specs) - 1], reader]
        rows = {x.name: plan_row(x, *item) for x, item in zip(linears, specs.items(), strict=True)}
        plan = Plan(recipe="spectrim", linears=rows).fitted(prepared.parts)
        store = Store(statistics, prepared.parts, prepared.recipe, plan)
        found = {x.name: prepared.maker.make(x, plan.linears[x.name]) for x in linears}
        store.write("a", found)
        again = store.read("a")
    assert again.keys() == found.keys()
    for name, tensors in found.items():
        assert again[name].keys() == tensors.keys()
        assert all(torch.equal(x, again[name][key]) and x.dtype == again[name][key].dtype for key, x in tensors.items())


def test_adacomp_refuses_integers(calibrated):
    with pytest.raises(RecipeError, match="adaComp fits factors that are no integers"):
        Recipe.read("adasvd", {"quantize.bits": 4})
    model, statistics = calibrated["llama"]
    linears = {x.name: plan_row(x, "integers", {"bits": 4}) for x in anatomy(model).linears}
    with (
        compression(model, "adasvd", stats=statistics, processor=processor("llama")) as prepared,
        pytest.raises(RecipeError, match="adaComp fits float factors, and the form 'integers' has none"),
    ):
        prepared.apply(Plan(recipe="adasvd", linears=linears))


def test_adacomp_refuses_a_plan_before_samples_run(words, tmp_path):
    model = families.FAMILIES["llama"]()
    linears = {x.name: plan_row(x, "integers", {"bits": 4}) for x in anatomy(model).linears}
    given = {"processor": processor("llama"), "text": words, "samples": 4, "seqlen": 12}
    with pytest.raises(RecipeError, match="adaComp fits float factors, and the form 'integers' has none"):
        compress(model, tmp_path / "out", recipe="adasvd", plan=Plan(recipe="adasvd", linears=linears), **given)
    assert not list(tmp_path.glob("out*"))


def test_damping_trades_what_samples_show_for_what_they_do_not():
    """Little damping: the least error in the metric. Much damping: that of rounding each entry by itself."""
    linear = anatomy(families.FAMILIES["llama"]()).linears[0]
    W, C = normal(linear.out_features, linear.in_features), metric(linear.in_features, decay=1.0)

    def rest(**part):
        quantize = QuantizePart(bits=3, **part)
        problem = Problem(linear, lambda: W, lambda: (C, None), StoragePart(), quantize)
        tensors = made(problem, "integers", {"bits": 3})
        return W - filled(problem.empty(), "integers", {"bits": 3}, tensors).product().double()

    found = [rest(damping=d) for d in (1e-3, 0.1, 10.0)]
    shown, all_over = [error(E, C) for E in found], [error(E) for E in found]
    assert shown == sorted(shown)
    assert all_over == sorted(all_over, reverse=True)
    assert error(found[0], C) < 0.9 * error(rest(method="rtn"), C)


def test_options_and_compensated_weights_are_dampened_by_the_samples(words, calibrated, monkeypatch):
    """Problems of the plan and of compensation know how many positions stand behind their metrics."""
    model, statistics = calibrated["llava"]
    seen: dict[str, set[tuple[float, float]]] = {}

    def watched(linear, *parts, **how):
        made = Problem(linear, *parts, **how)
        seen.setdefault(linear.name, set()).add(made.positions)
        return made

    for module in (run, maker):
        monkeypatch.setattr(module, "Problem", watched)
    changes = {"quantize.bits": 3, "compensate.kind": "anchored", "compensate.weight": 1.0}
    given = {"stats": statistics, "processor": processor("llava"), "changes": changes}
    with compression(model, "curvature", **given) as prepared, prepared.applied(prepared.plan(0.15)):
        compensated = {name for name in prepared.plan(0.15).linears if name in seen}
    assert len(compensated) > 7
    for name in compensated:
        found = []
        for count in (statistics.positions, statistics.labels):
            seen_of = {m: statistics.positions(name, m) for m in ("text", "image")}
            text, image = (min(n, count(name, m) or n) for m, n in seen_of.items())
            found.append(4 / (1 / text + 1 / image) if text and image else text + image)
        assert seen[name] == {tuple(found)}
