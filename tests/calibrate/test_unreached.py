"""Linears that no sample reaches: dead experts, parts that nothing calls, towers without images."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import families
from compressed import logits, low_rank
from helpers.samples import processor, word_tokenizer
from helpers.streams import weights
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate, experts
from spectrim.calibrate.experts import expert_statistics
from spectrim.checkpoint import read_provenance
from spectrim.errors import BudgetError, RecipeError
from spectrim.metrics.metric import layer_metric
from spectrim.pipeline import compress, compression
from spectrim.plan.plan import plan_row
from spectrim.recipe import Recipe, builtin_names

UNUSED = "model.layers.0.mlp.side"
DEAD = 2
MOMENTS = {"gradients": True, "curvature": True, "answer_tokens": 2}


class Experts(nn.Module):
    """A mixture of four experts in a module list, as model code outside of transformers has it; one is never chosen."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(width, inner), "down_proj": nn.Linear(inner, width)}) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scores = self.router(rows)
        scores[:, DEAD] = -torch.inf
        best, out = scores.argmax(1), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            where = (best == number).nonzero()[:, 0]
            if len(where):
                out = out.index_add(0, where, expert["down_proj"](expert["up_proj"](rows[where]).relu()))
        return out.view_as(x)


def mixture() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**families.TEXT))
    for layer in model.model.layers:
        layer.mlp = Experts(64, 96)
    return model.eval()


def with_unused() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**families.TEXT))
    model.model.layers[0].mlp.side = nn.Linear(64, 96)
    return model.eval()


MODELS = {"mixture": mixture, "unused": with_unused}


@pytest.fixture(scope="module")
def calibrated(words, tmp_path_factory) -> dict[str, Statistics]:
    given = {"processor": word_tokenizer(), "text": words, "samples": 6, "seqlen": 16, **MOMENTS}
    return {name: calibrate(make(), tmp_path_factory.mktemp(name) / "s", **given) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def llava(words, tmp_path_factory) -> dict[str, Statistics]:
    """Of text alone, and of images alone."""
    given = {"processor": processor("llava"), "samples": 4, "seqlen": 16, **MOMENTS}
    sources = {
        "text": {"text": words, "images": None},
        "image": {"text": None, "images": "builtin", "gradients": False},
    }
    return {
        name: calibrate(families.FAMILIES["llava"](), tmp_path_factory.mktemp(name) / "s", **given | source)
        for name, source in sources.items()
    }


RULES = {
    None: {},
    "bits auto": {"quantize.bits": "auto", "allocation.rule": "global-energy"},
    "3 bits": {"quantize.bits": 3, "allocation.rule": "uniform"},
    "uniform": {"allocation.rule": "uniform", "quantize.bits": None},
    "global-sigma": {"allocation.rule": "global-sigma", "quantize.bits": None},
    "global-energy": {"allocation.rule": "global-energy", "quantize.bits": None},
    "sensitivity": {"allocation.rule": "sensitivity", "quantize.bits": None},
    "adacr": {"allocation.rule": "adacr", "quantize.bits": None},
    "sensitivity, bits auto": {"allocation.rule": "sensitivity", "quantize.bits": "auto"},
    "adacr, 4 bits": {"allocation.rule": "adacr", "quantize.bits": 4},
    "anchored": {"compensate.kind": "anchored"},
    "adacomp": {"compensate.kind": "adacomp", "quantize.bits": None},
}
# Every metric; integers are among the rules.
MEASURED = sorted(
    name for name in builtin_names() if "gptq" not in name and Recipe.read(name).metric.kind != "identity"
)
CASES = [(recipe, None) for recipe in MEASURED] + [("svd-llm", rule) for rule in RULES if rule is not None]
CASES += [("spectrim", "anchored"), ("laser", "adacomp"), ("fwsvd", "anchored")]


@pytest.mark.parametrize(("recipe", "rule"), CASES)
def test_a_linear_that_nothing_calls_stays_dense_under_every_recipe_and_rule(recipe, rule, calibrated, caplog):
    model = with_unused()
    before = weights(model)
    options = {"stats": calibrated["unused"], "processor": word_tokenizer(), "changes": RULES[rule]}
    with caplog.at_level(logging.WARNING, "spectrim"), compression(model, recipe, **options) as prepared:
        for retain in (0.7, 0.6):
            plan = prepared.plan(retain)
            assert plan.bytes <= retain * plan.dense_bytes
        row = plan.linears[UNUSED]
        assert (row.form, row.spec, row.loss, row.metric) == ("dense", {}, None, "unreached")
        assert row.bytes == row.dense_bytes == 64 * 96 * 4
        assert len(plan.changed) > 5
        assert all(other.metric != "unreached" for name, other in plan.linears.items() if name != UNUSED)
        assert prepared.provenance(plan)["unreached"] == [UNUSED]
        with prepared.applied(plan) as small:
            assert logits(small).isfinite().all()
            assert torch.equal(small.get_submodule(UNUSED).weight, before[f"{UNUSED}.weight"])
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"1 of 15 linears stay dense, since no text sample reaches them: {UNUSED}"]


@pytest.mark.parametrize(("recipe", "rule"), CASES)
def test_a_dead_expert_is_compressed_as_its_neighbours_are(recipe, rule, calibrated):
    """With compensation, too, which leaves experts alone: they read other tokens in the compressed model."""
    options = {"stats": calibrated["mixture"], "processor": word_tokenizer(), "changes": RULES[rule]}
    with compression(mixture(), recipe, **options) as prepared:
        plan = prepared.plan(0.5)
        assert plan.bytes <= 0.5 * plan.dense_bytes
        dead = {name: row for name, row in plan.linears.items() if f"experts.{DEAD}." in name}
        assert len(dead) == 4
        assert all(row.metric == "experts" for row in dead.values())
        assert {row.metric for name, row in plan.linears.items() if name not in dead} == {"text"}
        assert prepared.unreached == frozenset()
        if prepared.recipe.allocation.rule == "loss-aware":
            assert all(row.loss is not None for row in dead.values())
        with prepared.applied(plan) as small:
            assert logits(small).isfinite().all()


@pytest.mark.parametrize("role", ["up_proj", "down_proj"])
def test_a_dead_expert_has_the_mean_moments_of_its_layer(role, calibrated):
    statistics, layer = calibrated["mixture"], "model.layers.1.mlp.experts"
    parts = anatomy(mixture())
    others = [f"{layer}.{number}.{role}" for number in range(4) if number != DEAD]
    inputs = [moment for name in others if (moment := statistics.moment(name, "text")) is not None]
    outputs = [statistics.output(name, "text") for name in others if statistics.output(name, "text") is not None]
    assert len(inputs) == len(outputs) > 1
    count, labels = sum(moment.count for moment in inputs), outputs[0].labels
    C = sum(moment.second for moment in inputs) / count
    found = layer_metric(Recipe.read("curvature").metric, parts.linear(f"{layer}.{DEAD}.{role}"), statistics)
    assert found.source == "experts"
    torch.testing.assert_close(found.value, C)
    G = sum(moment.sums["output"] for moment in outputs) / sum(moment.count for moment in outputs)
    size, damping = len(G), Recipe.read("curvature").metric.damping
    damped = G + damping * float(G.trace()) / size * torch.eye(size, dtype=G.dtype)
    dense = found.output.dense(size)
    torch.testing.assert_close(dense / dense.trace(), damped / damped.trace(), rtol=1e-6, atol=1e-12)
    # In nats: ½ 1/labels tr G tr C, as if one token of the layer had chosen it.
    expected = 0.5 / labels * float(G.trace()) * float(C.trace())
    assert float(found.output.nats[0] * G.trace() * C.trace()) == pytest.approx(expected, rel=1e-6)
    gradients = [statistics.gradient(name, "text") for name in others]
    columns = torch.stack([g.fisher_cols / g.count for g in gradients if g is not None]).sum(0) / count
    fisher = layer_metric(Recipe.read("fwsvd").metric, parts.linear(f"{layer}.{DEAD}.{role}"), statistics)
    torch.testing.assert_close(fisher.value, columns.clamp_min(float(columns.max()) * 1e-12))


@pytest.mark.parametrize("role", ["up_proj", "down_proj"])
def test_an_experts_moments_are_drawn_towards_its_layers_mean(role, calibrated, monkeypatch):
    """A mean of its own tokens and of κ of the layer's, with the trace of its own."""
    monkeypatch.setattr(experts, "SHRINKAGE", 0.125)
    statistics, layer = Statistics.open(calibrated["mixture"].path), "model.layers.1.mlp.experts"
    names = [f"{layer}.{number}.{role}" for number in range(4) if number != DEAD]
    linear = anatomy(mixture()).linear(names[0])
    read, kappa = expert_statistics(statistics, linear), 0.125 * linear.in_features
    inputs, own = [statistics.moment(name, "text") for name in names], statistics.moment(names[0], "text")
    mean = sum(x.second for x in inputs) / sum(x.count for x in inputs)
    found = read.moment(names[0], "text")
    assert found.count == own.count == read.positions(names[0], "text")
    scaled = mean * own.second.trace() / mean.trace()
    torch.testing.assert_close(found.second, (own.count * own.second + kappa * scaled) / (own.count + kappa))
    outputs, own = [statistics.output(name, "text") for name in names], statistics.output(names[0], "text")
    mean = sum(x.sums["output"] for x in outputs)
    found = read.output(names[0], "text")
    assert found.count == own.count
    scaled = mean * own.sums["output"].trace() / mean.trace()
    blended = (own.count * own.sums["output"] + kappa * scaled) / (own.count + kappa)
    torch.testing.assert_close(found.sums["output"], blended)
    torch.testing.assert_close(found.traces, own.traces)
    assert expert_statistics(statistics, anatomy(mixture()).linear("model.layers.1.self_attn.q_proj")) is statistics


@pytest.mark.parametrize("recipe", ["spectrim", "laser", "jw-svd", "svd-llm", "adasvd", "curvature+gptq"])
@pytest.mark.parametrize("kind", ["none", "anchored"])
def test_a_vision_model_with_text_alone_keeps_its_tower(recipe, kind, llava):
    model = families.FAMILIES["llava"]()
    options = {"stats": llava["text"], "processor": processor("llava"), "changes": {"compensate.kind": kind}}
    with compression(model, recipe, **options) as prepared:
        plan = prepared.plan(0.8)
        assert plan.bytes <= 0.8 * plan.dense_bytes
        places = {prepared.parts.linear(name).place for name in plan.changed}
        assert places == {"backbone"}
        assert prepared.unreached == {x.name for x in prepared.parts.linears if x.place != "backbone"}
        with prepared.applied(plan) as small:
            assert logits(small).isfinite().all()
        with pytest.raises(BudgetError, match=r"linears stay dense \(no text sample reaches them\) and take"):
            prepared.plan(0.1)


def test_images_alone_serve_a_joint_recipe(llava):
    """All linears are reached; a recipe of text is refused, one sentence long."""
    options = {"stats": llava["image"], "processor": processor("llava")}
    with compression(families.FAMILIES["llava"](), "spectrim", **options) as prepared:
        plan = prepared.plan(0.6)
        assert {row.metric for row in plan.linears.values()} == {"image"}
        assert not prepared.unreached
    with (
        pytest.raises(
            RecipeError, match=r"the recipe needs text moments and .* has none; calibrate with a source of text"
        ),
        compression(families.FAMILIES["llava"](), "svd-llm", **options),
    ):
        pass


def test_nothing_that_samples_reach_is_an_error(llava):
    changes = {"allocation.places": ["tower", "connector"]}
    options = {"stats": llava["text"], "processor": processor("llava"), "changes": changes}
    with (
        compression(families.FAMILIES["llava"](), "spectrim", **options) as prepared,
        pytest.raises(RecipeError, match="no text sample reaches any linear that the recipe may change; give samples"),
    ):
        prepared.plan(0.9)


@pytest.mark.parametrize("only", [False, True])
def test_blocks_with_a_dead_expert_are_refined(only, calibrated):
    changes = {"compensate.kind": "anchored", "compensate.refine": 4}
    model = mixture()
    dead = f".experts.{DEAD}."
    before = {name: w.clone() for name, w in weights(model).items()}
    given = {"stats": calibrated["mixture"], "processor": word_tokenizer(), "changes": changes}
    with compression(model, "jw-svd", **given) as prepared:
        plan = prepared.plan(0.5)
        if only:  # nothing of a block that a gradient reaches
            linears = {x.name: x for x in prepared.parts.linears}
            rows = {n: row if dead in n else plan_row(linears[n]) for n, row in plan.linears.items()}
            plan = plan.model_copy(update={"linears": rows})
        changed = {name for name in plan.changed if dead in name}
        assert changed
        with prepared.applied(plan) as small:
            assert torch.isfinite(logits(small)).all()
            for name in changed:  # no sample says how to refine them
                layer = small.get_submodule(name)
                alone = prepared.maker.make(prepared.parts.linear(name), plan.linears[name])
                for key, tensor in layer.tensors().items():
                    torch.testing.assert_close(tensor, alone[key], atol=1e-6, rtol=1e-4)
    assert all(torch.equal(before[name], w) for name, w in weights(model).items())


def test_what_stayed_dense_is_reported_and_the_checkpoint_loads(words, tmp_path: Path):
    given = {"processor": processor("llava"), "text": words, "images": None, "samples": 4, "seqlen": 16}
    small = compress(families.FAMILIES["llava"](), tmp_path / "small", retain=0.8, **given)
    assert low_rank(small)
    record = read_provenance(tmp_path / "small")
    tower = [x.name for x in anatomy(families.FAMILIES["llava"]()).linears if x.place != "backbone"]
    assert record["unreached"] == sorted(tower)
    rows = json.loads((tmp_path / "small" / "plan.json").read_text())["linears"]
    assert all((rows[name]["metric"], rows[name]["form"]) == ("unreached", "dense") for name in tower)


def test_a_plan_by_hand_may_change_what_no_sample_reaches(calibrated):
    with compression(with_unused(), "svd-llm", stats=calibrated["unused"]) as prepared:
        plan = prepared.plan(0.6)
        rows = {**plan.linears, UNUSED: plan_row(prepared.parts.linear(UNUSED), "low-rank", {"rank": 5})}
        edited = plan.model_copy(update={"linears": rows}).fitted(prepared.parts)
        assert prepared.provenance(edited)["unreached"] == []
        with prepared.applied(edited) as small:
            assert low_rank(small)[UNUSED].rank == 5
