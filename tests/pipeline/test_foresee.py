"""A compression that is estimated first writes the same, and keeps in its record what it was to take and took."""

import logging

import pytest
import torch

from families import FAMILIES
from helpers.samples import processor
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate
from spectrim.checkpoint import load, read_provenance
from spectrim.checkpoint.read import load_empty
from spectrim.checkpoint.size import saved_tensors
from spectrim.demo import resolve
from spectrim.pipeline import compression, job_compression, probe, run
from spectrim.pipeline.budget import Budget
from spectrim.pipeline.jobs import check_job
from spectrim.plan.maker import solving
from spectrim.recipe import Recipe
from spectrim.tune import pace


@pytest.fixture(scope="module")
def dense(words, tmp_path_factory):
    """A tiny LLaVA on disk, and its statistics."""
    path = tmp_path_factory.mktemp("probe")
    FAMILIES["llava"]().save_pretrained(path / "model")
    given = {"processor": processor("llava"), "text": words, "samples": 4, "seqlen": 16, "gradients": True}
    return path / "model", calibrate(load(path / "model"), path / "stats", **given)


def compressed(dense, out, *, estimate, recipe="spectrim", changes=None, budget=None):
    directory, statistics = dense
    budgets = [budget or Budget(retain=0.5)]
    options = {"changes": changes, "plan": None, "stats": statistics, "overwrite": False, "samples": {}}
    job = check_job(str(directory), out, recipe=recipe, budgets=budgets, **options)
    with job_compression(job, load(directory), processor("llava"), None, {}, estimate=estimate) as prepared:
        for plan, target in zip(prepared.plans(job), job.targets, strict=True):
            prepared.save(plan, target)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("recipe", ["svd", "fwsvd", "adasvd", "laser", "spectrim"])
def test_the_probe_changes_nothing_and_the_record_has_both(recipe, dense, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "spectrim"):
        weights = compressed(dense, tmp_path / "estimated", estimate=True, recipe=recipe)
    assert weights == compressed(dense, tmp_path / "plain", estimate=False, recipe=recipe)
    assert "cost" not in read_provenance(tmp_path / "plain")
    cost = read_provenance(tmp_path / "estimated")["cost"]["compress"]
    for found in (cost["estimate"], cost["actual"]):
        assert min(found.values()) > 0
    assert sum(message.startswith(("compress: will take", "compress: took")) for message in caplog.messages) == 2


def test_integers_are_tried_too_and_a_finished_decomposition_is_not_counted(dense, tmp_path):
    changes = {"quantize.bits": 4}
    compressed(dense, tmp_path / "first", estimate=True, changes=changes)
    compressed(dense, tmp_path / "second", estimate=True, changes=changes, budget=Budget(bits=5))
    first, second = (read_provenance(tmp_path / name)["cost"]["compress"] for name in ("first", "second"))
    assert second["estimate"]["disk"] < first["estimate"]["disk"]
    assert second["actual"]["disk"] < first["actual"]["disk"]


def test_the_end_to_end_pass_takes_its_samples_as_often_as_it_passes_over_them(dense, monkeypatch):
    directory, statistics = dense
    model, changes = load(directory), {"tune.epochs": 8, "tune.samples": 3}
    monkeypatch.setattr(probe, "pace", lambda *given, **more: (2.0, 0.5))
    given = model, anatomy(model), Recipe.read("spectrim", changes), statistics
    assert probe._tuning(*given, processor("llava")) == 2 * 3 * (2.0 + 9 * 0.5)  # text and images
    assert probe._tuning(*given, None) == 0


def test_a_pace_is_that_of_all_steps_but_the_first_until_there_are_enough(monkeypatch):
    clock = iter([10.0, 11.0, 12.0, 19.0, 20.0])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(clock))
    assert pace._pace(iter([1, 2, 3, 5, 100])) == pytest.approx((20 - 10) / 10)


def test_what_the_end_to_end_pass_is_timed_by_leaves_the_model_as_it_was(dense):
    directory, statistics = dense
    model = load(directory)
    before, parts = {name: x.clone() for name, x in model.state_dict().items()}, anatomy(model)
    model.get_parameter(f"{parts.linears[0].name}.weight").requires_grad_(False)
    wanted = [x.requires_grad for x in model.parameters()]
    data = probe._some(model, parts, statistics, processor("llava"), 3)
    for modality in data.samples:
        assert min(pace.pace(model, parts, data, modality, answer_tokens=4, seed=0)) > 0
    assert [x.requires_grad for x in model.parameters()] == wanted
    assert all(x.grad is None for x in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_without_values_has_the_shapes_of_one_with_them(family, tmp_path):
    FAMILIES[family]().to(torch.bfloat16).save_pretrained(tmp_path)
    whole, empty = load(tmp_path), load_empty(tmp_path)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert anatomy(empty) == anatomy(whole)
    assert saved_tensors(empty) == saved_tensors(whole)  # tied ones once


def test_the_built_in_model_without_values():
    assert anatomy(load_empty(resolve("demo"))) == anatomy(load(resolve("demo")))


def prepare(dense, memory, keep=()):
    """Begin a compression without compensation, as far as spectra, and end it."""
    changes = {"compensate.kind": "none", "allocation.keep": list(keep)}
    with compression(load(dense[0]), stats=dense[1], processor=processor("llava"), changes=changes, memory=memory):
        pass


def test_a_linear_that_takes_more_memory_than_there_is_gets_a_line_before_anything_starts(dense, caplog, monkeypatch):
    monkeypatch.setattr(run, "held_memory", lambda _: 2**30)
    prepare(dense, "2GiB")
    assert not caplog.messages
    alone = Recipe.read("spectrim", {"compensate.kind": "none"})
    widest = max(anatomy(load(dense[0])).linears, key=lambda linear: solving(linear, alone)).name
    prepare(dense, "1.0001GiB")
    (line,) = caplog.messages
    assert widest in line
    assert "--memory 1.0001GiB leaves 0.0 GiB" in line
    caplog.clear()
    prepare(dense, "1.0001GiB", keep=["*"])  # all stay dense
    assert not caplog.messages
    monkeypatch.setattr(run, "limit_bytes", lambda memory, _: 2**30 if memory is None else 0)
    prepare(dense, None)
    assert "the machine has 0.0 GiB" in caplog.text


def test_what_the_steps_of_a_linear_take_follows_the_recipe(dense):
    down = next(x for x in anatomy(load(dense[0])).linears if x.role == "down")
    taken = {
        name: solving(down, Recipe.read(recipe, changes))
        for name, recipe, changes in (
            ("plain", "svd", {}),
            ("inputs", "svd-llm", {"compensate.kind": "none"}),
            ("both", "curvature", {"compensate.kind": "none"}),
            ("compensated", "spectrim", {}),
            ("integers", "curvature", {"quantize.bits": 4, "compensate.kind": "none"}),
        )
    }
    out, size = down.out_features, down.in_features
    assert taken["plain"] == 8 * 6 * out * size
    assert taken["inputs"] - taken["plain"] == 8 * 2 * size**2
    assert taken["both"] - taken["inputs"] == 8 * 2 * out**2
    less = solving(down, Recipe.read("curvature", {"compensate.kind": "none"}), "sketch:64")
    assert less == taken["inputs"]
    assert solving(down, Recipe.read("curvature", {"quantize.bits": 4}), "sketch:64") == taken["integers"]
    assert taken["compensated"] == taken["integers"] == 8 * (5 * size**2 + 4 * out**2 + 6 * out * size)


def test_the_estimate_counts_linears_that_are_too_wide_to_be_tried(dense, monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "_SECONDS", -1)  # after the first kind
    monkeypatch.setattr(probe, "solving", lambda linear, recipe, form: 2**33)
    directory, statistics = dense
    model = load(directory)
    job = check_job(
        str(directory), tmp_path / "out", recipe="laser", budgets=[Budget(retain=0.5)], changes=None, plan=None,
        stats=statistics, overwrite=False, samples={},
    )  # fmt: skip
    found = probe.foresee(model, anatomy(model), job, statistics, processor("llava"), statistics.path / "spectra")
    assert found.memory > 2**33
