"""Experts of a real mixture through calibration, planning and saving."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from compressed import logits
from families import FAMILIES
from helpers.samples import word_tokenizer
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate
from spectrim.calibrate.experts import tokens_by_expert
from spectrim.checkpoint import load, read_provenance
from spectrim.experts import fuse
from spectrim.linear import Linear
from spectrim.mismatch.analysis import inspect
from spectrim.pipeline import compression
from spectrim.plan import Plan
from spectrim.plan.plan import plan_row
from spectrim.plan.teams import Teams

WORDS = {"text": "builtin", "images": None, "samples": 8, "seqlen": 12, "batch_size": 4}


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    return calibrate(
        FAMILIES["mixtral"](), tmp_path_factory.mktemp("mixtral"), processor=word_tokenizer(), gradients=True, **WORDS
    )


def test_every_routed_token_is_counted_once(statistics):
    """Two experts of every token, and inputs of gate and up are one moment."""
    for layer in range(2):
        experts = [f"model.layers.{layer}.mlp.experts.{number}" for number in range(4)]
        for name in ("w1", "w2", "w3"):
            assert sum(statistics.positions(f"{expert}.{name}", "text") for expert in experts) == 2 * 8 * 12
        q = statistics.moment(f"model.layers.{layer}.self_attn.q_proj", "text")
        assert q.count == 8 * 12


def test_all_experts_read_all_tokens_if_asked(statistics, tmp_path):
    model = FAMILIES["mixtral"]()
    every = calibrate(
        model, tmp_path, processor=word_tokenizer(), gradients=False, curvature=False, all_experts=True, **WORDS
    )
    moments = [every.moment(f"model.layers.0.mlp.experts.{number}.w1", "text") for number in range(4)]
    assert all(moment.count == 8 * 12 for moment in moments)
    for moment in moments[1:]:
        torch.testing.assert_close(moment.second, moments[0].second)
    # What leaves the layer is routed as ever.
    q = [one.moment("model.layers.1.self_attn.q_proj", "text").second for one in (every, statistics)]
    torch.testing.assert_close(*q)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("laser", {}),
        ("jw-svd", {"compensate.kind": "none"}),
        ("curvature+gptq", {"quantize.bits": "auto"}),
        ("svd", {}),
    ],
)
def test_experts_of_a_layer_are_stored_alike_if_asked(recipe, changes, statistics):
    changes = {**changes, "storage.experts": "same"}
    stats = None if recipe == "svd" else statistics.path
    with compression(FAMILIES["mixtral"](), recipe, stats=stats, changes=changes) as prepared:
        plan = prepared.plan(0.4)
        assert 0.3 * plan.dense_bytes < plan.bytes <= 0.4 * plan.dense_bytes
        kinds = defaultdict(list)
        for linear in prepared.parts.linears:
            if linear.expert is not None:
                row = plan.linears[linear.name]
                kinds[linear.block, linear.role].append((row.form, row.spec, row.bytes))
        assert len(kinds) == 6
        assert all(each == each[:1] * 4 for each in kinds.values())


def test_experts_can_be_inspected(statistics):
    found = inspect(FAMILIES["mixtral"](), statistics)
    assert {row.name for row in found.effective_ranks} == {x.name for x in anatomy(FAMILIES["mixtral"]()).linears}


def test_lists_of_experts_in_one_block_are_told_apart(monkeypatch):
    """Tokens and options: each has an expert 0."""
    names = [f"layers.0.mlp.{name}.experts.{n}.up" for name in ("text_moe", "vision_moe") for n in range(2)]
    names += ["layers.1.mlp.experts.0.up"]
    linears = tuple(Linear(x, "backbone", x[:8], "up", 8, 8, None, torch.float32) for x in names)
    stats = SimpleNamespace(
        manifest=SimpleNamespace(data=SimpleNamespace(modalities=("text",))),
        positions=lambda name, _: names.index(name) + 1,
    )
    assert tokens_by_expert(stats, linears) == {
        "layers.0.mlp.text_moe.experts": {0: 1, 1: 2},
        "layers.0.mlp.vision_moe.experts": {0: 3, 1: 4},
        "layers.1": {0: 5},
    }
    monkeypatch.setattr("spectrim.plan.teams._numbers", lambda _: {"dense": 0})
    assert {*Teams(linears, dict.fromkeys(names)).each(dict.fromkeys(names[::2], 0))} == {*names}
    assert len(Teams(linears, dict.fromkeys(names))._members) == 2


def uneven():
    """A mixture of which two experts want their inputs rotated and two do not."""
    model = FAMILIES["mixtral"]()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "experts" in name and weight.ndim == 3:
                weight[::2, :, ::16] *= 10
    return model


@pytest.mark.parametrize("order", [("each", "same"), ("same", "each")])
def test_options_of_one_way_to_store_experts_are_not_taken_for_the_other(order, tmp_path):
    """Where experts are stored alike none is rotated, and options are kept beside the same statistics."""
    stats = calibrate(uneven(), tmp_path, processor=word_tokenizer(), gradients=True, **WORDS)
    changes = {"quantize.bits": 3, "quantize.group": 32, "compensate.kind": "none"}
    for experts in order:
        with compression(
            uneven(), "spectrim", stats=stats.path, changes={**changes, "storage.experts": experts}
        ) as prepared:
            plan = prepared.plan(0.2)
            several = [plan.linears[x.name] for x in prepared.parts.linears if x.expert is not None]
            assert any("'rotated': True" in str(row.spec) for row in several) == (experts == "each")


@pytest.mark.parametrize(("bits", "retain"), [(3, 0.2), ("auto", 0.2)])
def test_a_plan_of_narrower_experts_can_be_given_back(bits, retain, statistics, tmp_path):
    with compression(
        FAMILIES["mixtral"](), "spectrim", stats=statistics.path, changes={"quantize.bits": bits}
    ) as prepared:
        plan = prepared.plan(retain)
        if bits == 3:
            some = next(x for x in prepared.parts.linears if x.expert is not None and x.role == "down")
            row = plan_row(some, "narrow", {"inputs": some.in_features // 2})
            plan = plan.model_copy(update={"linears": plan.linears | {some.name: row}})
        (tmp_path / "plan.json").write_text(plan.model_dump_json())
        read = Plan.read(tmp_path / "plan.json", prepared.parts)
    assert {name: (row.form, row.spec, row.bytes) for name, row in read.linears.items()} == {
        name: (row.form, row.spec, row.bytes) for name, row in plan.linears.items()
    }


def test_a_checkpoint_records_tokens_by_expert_and_loads(statistics, tmp_path):
    with compression(FAMILIES["mixtral"](), "laser", stats=statistics.path) as prepared:
        plan = prepared.plan(0.5)
        assert any(".experts." in name for name in plan.changed)
        prepared.save(plan, tmp_path / "a")
        with prepared.applied(plan) as small:
            expected = logits(small)
    seen = read_provenance(tmp_path / "a")["experts"]
    assert seen.keys() == {"model.layers.0", "model.layers.1"}
    assert sum(seen["model.layers.0"].values()) == 2 * 8 * 12
    again = load(tmp_path / "a")
    assert torch.equal(logits(again), expected)
    dense = again.dequantize()
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_of_the_model_fused_or_not(statistics):
    model = FAMILIES["mixtral"]()
    anatomy(model)
    statistics.check_model(model)
    fuse(model)
    anatomy(model)
    statistics.check_model(model)
