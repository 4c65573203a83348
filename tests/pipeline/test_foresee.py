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
from spectrim.pipeline import job_compression
from spectrim.pipeline.budget import Budget
from spectrim.pipeline.jobs import check_job


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


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_without_values_has_the_shapes_of_one_with_them(family, tmp_path):
    FAMILIES[family]().to(torch.bfloat16).save_pretrained(tmp_path)
    whole, empty = load(tmp_path), load_empty(tmp_path)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert anatomy(empty) == anatomy(whole)
    assert saved_tensors(empty) == saved_tensors(whole)  # tied ones once


def test_the_built_in_model_without_values():
    assert anatomy(load_empty(resolve("demo"))) == anatomy(load(resolve("demo")))
