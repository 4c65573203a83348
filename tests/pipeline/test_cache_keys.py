"""What spectra and compensated blocks on disk depend on is in their keys, and what is kept is precise."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel

import families
from helpers.calibrated import tiny
from helpers.matrices import normal
from helpers.samples import calibrated_windows, word_tokenizer
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.compensate import run
from spectrim.compensate.store import Store
from spectrim.maths.decompose import decompose, factors
from spectrim.metrics import spectra
from spectrim.metrics.metric import layer_metric
from spectrim.metrics.spectra import cache_key
from spectrim.pipeline import compression
from spectrim.plan.plan import Plan
from spectrim.recipe import Recipe
from spectrim.tune import Tuning

# What does not change compensated weights: the names of a recipe, and its allocation, whose outcome is the plan.
DESCRIPTIVE = {"version", "name", "summary", "paper"}


@pytest.fixture(scope="module")
def statistics(words, tmp_path_factory) -> Statistics:
    path = tmp_path_factory.mktemp("s")
    given = {"processor": word_tokenizer(), "text": words, "samples": 8, "seqlen": 16}
    return calibrate(tiny("llama", torch.float32), path / "s", **given, curvature=True)


def others(annotation: Any, now: Any) -> list[Any]:
    """Other values that a field may have, from its type alone."""
    found: list[Any] = []
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is Literal:
            found += get_args(kind)
        found += {bool: [True, False], int: [1, 2, 3], float: [0.25, 0.5, 0.75], type(None): [None]}.get(kind, [])
    return [value for value in found if value != now]


def variants(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """The recipe with one field changed at a time, whatever fields recipes have."""
    for part in Recipe.model_fields.keys() - DESCRIPTIVE:
        value = getattr(recipe, part)
        assert isinstance(value, BaseModel), f"tell this test how to change {part}"
        for name, info in type(value).model_fields.items():
            found = others(info.annotation, getattr(value, name))
            named = (part, name) in {("allocation", key) for key in ("places", "keep", "only")}
            assert found or named, f"tell this test how to change {part}.{name}"
            for other in found:
                yield f"{part}.{name}", recipe.model_copy(update={part: value.model_copy(update={name: other})})


MODEL = tiny("llama")
PARTS = anatomy(MODEL)


def store(statistics: Statistics, recipe: Recipe, plan: Plan) -> Path:
    return Store(statistics, PARTS, recipe, plan).directory


def trained(statistics: Statistics, recipe: Recipe, plan: Plan) -> Path:
    return Tuning(MODEL, MODEL, PARTS, recipe, plan, statistics, None).path


@pytest.fixture(scope="module")
def plan(statistics) -> Plan:
    with compression(tiny("llama", torch.float32), "laser", stats=statistics) as prepared:
        return prepared.plan(0.5)


@pytest.mark.parametrize("source", ["laser", "svd-llm", "adasvd", "jw-svd+gptq"])
def test_recipes_that_differ_in_any_field_have_compensated_blocks_of_their_own(source, statistics, plan):
    recipe = Recipe.read(source)
    keys = {recipe.model_dump_json(): store(statistics, recipe, plan), "tuned": trained(statistics, recipe, plan)}
    seen = set()
    for field, other in variants(recipe):
        if field.startswith(("allocation.", "tune.")):
            assert store(statistics, other, plan) == store(statistics, recipe, plan), field
            if field.startswith("tune."):
                keys[other.model_dump_json()] = trained(statistics, other, plan)
        else:
            keys[other.model_dump_json()] = store(statistics, other, plan)
            seen.add(field)
    assert len(set(keys.values())) == len(keys)
    assert {"quantize.bits", "quantize.damping", "quantize.method", "storage.multiple", "metric.gamma"} <= seen
    renamed = recipe.model_copy(update={"name": "other", "summary": "other", "paper": "other"})
    assert store(statistics, renamed, plan) == store(statistics, recipe, plan)


def test_other_plans_and_statistics_have_compensated_blocks_of_their_own(words, statistics, plan, tmp_path):
    recipe = Recipe.read("laser")
    first = next(iter(plan.changed))
    keys = {store(statistics, recipe, plan)}
    changes: list[dict[str, Any]] = [{"rank": 3}, {"rank": None}, {"integers": {"bits": 4}}]
    for change in changes:
        row = plan.linears[first].model_dump() | change
        rows = plan.model_dump() | {"linears": plan.model_dump()["linears"] | {first: row}}
        keys.add(store(statistics, recipe, Plan.model_validate(rows)))
    given = {"processor": word_tokenizer(), "text": words, "samples": 8, "seqlen": 12}
    other = calibrate(tiny("llama", torch.float32), tmp_path / "s", **given, curvature=True)
    keys.add(store(other, recipe, plan).name)
    assert len({Path(key).name for key in keys}) == 5


def test_metrics_that_differ_in_any_field_have_spectra_of_their_own(statistics):
    recipe = Recipe.read("laser")
    keys = {recipe.metric.model_dump_json(): cache_key(recipe.metric, statistics, PARTS)}
    for field, other in variants(recipe):
        key = cache_key(other.metric, statistics, PARTS)
        if field.startswith("metric."):
            keys[other.metric.model_dump_json()] = key
        else:
            assert key == cache_key(recipe.metric, statistics, PARTS), field
    assert len(set(keys.values())) == len(keys) > 10
    heads = anatomy(families.FAMILIES["qwen3"]())
    assert cache_key(recipe.metric, statistics, heads) not in keys.values()


@pytest.mark.parametrize(
    "change",
    [{"quantize.damping": 0.5}, {"quantize.method": "rtn"}, {"compensate.weight": 0.9}, {"metric.damping": 0.5}],
)
def test_what_is_kept_of_one_recipe_is_not_taken_for_another(change, statistics, tmp_path):
    """The weights are those that fresh statistics give."""
    bits = {"compensate.kind": "anchored", "quantize.bits": 4, "allocation.rule": "uniform"}
    shutil.copytree(statistics.path, tmp_path / "fresh", ignore=shutil.ignore_patterns("spectra", "compensated"))
    found = []
    for changes, directory in (
        (bits, statistics.path),
        (bits | change, statistics.path),
        (bits | change, tmp_path / "fresh"),
    ):
        options = {"stats": directory, "processor": word_tokenizer(), "changes": changes}
        dense = tiny("llama", torch.float32)
        with compression(dense, "laser", **options) as prepared, prepared.applied(prepared.plan(0.3)) as small:
            found.append({name: tensor.clone() for name, tensor in small.state_dict().items()})
    first, second, fresh = found
    assert second.keys() == fresh.keys()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in second.items())
    assert first.keys() != second.keys() or not all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_projections_on_inputs_of_very_different_size_are_kept_in_full_precision(tmp_path):
    """A tall weight, whose inputs differ by 10⁶ in size: as good from the disk as from memory."""
    model = torch.nn.Sequential(torch.nn.Linear(12, 40, bias=False)).double()
    (linear,) = anatomy(model).linears
    scale = torch.logspace(-3, 3, 12, dtype=torch.float64)
    X = normal(200, 12) * scale
    C = X.T @ X / 200

    metric = SimpleNamespace(value=C, output=None, source="text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "layer_metric", lambda *_: metric)
        made = spectra.make_spectra(model, anatomy(model), Recipe.read("jw-svd").metric, None, tmp_path / "spectra")
    W = model[0].weight.detach()
    s, P, Q = made.spectrum(linear.name).directions(5)
    assert P.dtype == Q.dtype == torch.float64
    spectrum = decompose(W, C)
    expected = torch.matmul(*factors(W, spectrum.s[:5], spectrum.P[:, :5], spectrum.Q[:, :5]))
    found = torch.matmul(*factors(W, s, P, Q))
    error = ((found - expected) @ C * (found - expected)).sum() / (W @ C * W).sum()
    assert float(error) < 1e-20


def test_refinement_lowers_the_error_in_the_output_metric(statistics):
    """Of the last block on the calibration samples, against the same steps in the identity."""
    model, recipe, real, errors = tiny("llama", torch.float32), Recipe.read("laser"), run.refine, {}
    last = anatomy(model).linear("model.layers.1.mlp.down_proj")
    whole = recipe.metric.model_copy(update={"per_head": False})
    root = layer_metric(whole, last, statistics).output.roots[0]
    ids = calibrated_windows(statistics.manifest.data.text, samples=8, seqlen=16)

    def output() -> torch.Tensor:
        found = []
        hook = model.get_submodule(last.block).register_forward_hook(lambda *call: found.append(call[2]))
        model(input_ids=ids)
        hook.remove()
        return found[0].flatten(0, 1)

    def plain(unit, samples, steps, overflow, outputs, output):
        real(unit, samples, steps, overflow, outputs, None if unit.name == last.block else output)

    with torch.no_grad():
        dense = output()
    changes = {"compensate.kind": "anchored", "compensate.refine": 100}
    for name, refine in (("metric", real), ("identity", plain)):
        shutil.rmtree(statistics.path / "compensated", ignore_errors=True)
        options = {"stats": statistics, "processor": word_tokenizer(), "changes": changes}
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(run, "refine", refine)
            with compression(model, recipe, **options) as prepared, prepared.applied(prepared.plan(0.4)):
                errors[name] = float(root.times((dense - output()).T.double()).square().sum())
    assert errors["metric"] < 0.95 * errors["identity"], errors
