"""Losses that curvature predicts of plans, against quadratic forms and against measurements."""

import pytest
import torch
from torch.nn import functional

import families
from curvatures import curvature, predicted
from helpers.matrices import normal
from helpers.samples import word_tokenizer
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.errors import RecipeError
from spectrim.metrics.metric import layer_metric
from spectrim.pipeline import compression
from spectrim.samples import load_text, text_windows


@pytest.mark.parametrize("recipe", ["curvature", "laser"])
def test_the_loss_of_a_plan_is_that_of_its_weights(words, recipe, tmp_path):
    """½/labels · tr(Σ g gᵀ ΔW C ΔWᵀ) of what the factored model lacks, head by head where it is factored so."""
    model = families.FAMILIES["llama"]()
    options = {"processor": word_tokenizer(), "text": words, "samples": 4, "seqlen": 12}
    statistics = calibrate(model, tmp_path / "s", **options, curvature=True)
    dense = {x.name: model.get_submodule(x.name).weight.detach().double() for x in anatomy(model).linears}
    changes = {"metric.damping": 1e-5}
    with compression(model, recipe, stats=statistics, changes=changes) as prepared:
        plan = prepared.plan(0.5)
        prepared.apply(plan)
    total = 0.0
    for one in anatomy(families.FAMILIES["llama"]()).linears:
        moment, output, row = (
            statistics.moment(one.name, "text"),
            statistics.output(one.name, "text"),
            plan.linears[one.name],
        )
        loss = 0.0
        if row.form != "dense":
            D = dense[one.name] - model.get_submodule(one.name).to_dense().weight.detach().double()
            heads = one.per_head if recipe == "laser" and one.per_head else 1
            G = output.sums["output"] + 1e-5 * output.sums["output"].trace() / one.out_features * torch.eye(
                one.out_features
            )
            ids = torch.arange(one.out_features) // (one.out_features // heads)
            G = torch.where(ids[:, None] == ids, G, 0.0)
            loss = float((G @ D @ moment.second @ D.T).trace()) / moment.count / output.labels / 2
        assert row.loss == pytest.approx(loss, rel=1e-3, abs=1e-9)
        total += loss
    assert any(isinstance(row.spec.get("rank"), list) for row in plan.linears.values()) == (recipe == "laser")
    assert plan.loss == pytest.approx(total, rel=1e-3)
    assert total > 0


def test_statistics_without_curvature_are_refused(words, tmp_path):
    options = {"processor": word_tokenizer(), "text": words, "samples": 2, "seqlen": 8}
    model = families.FAMILIES["llama"]()
    statistics = calibrate(model, tmp_path / "s", curvature=False, **options)
    with pytest.raises(RecipeError, match="has none; calibrate again without --no-curvature"):
        layer_metric(curvature(), anatomy(model).linears[0], statistics)


def test_predicted_losses_are_the_measured_ones(tmp_path):
    """Second differences of the loss of the built-in model on its calibration samples, in random directions."""
    source = resolve("demo")
    model, processor = load(source, dtype=torch.float32), load_processor(source)
    options = {"text": "builtin", "images": None, "samples": 32, "seqlen": 64, "curvature": True, "labels": "sampled"}
    statistics: Statistics = calibrate(model, tmp_path / "s", processor=processor, **options)
    windows = text_windows(load_text("builtin"), processor.tokenizer, samples=32, seqlen=64, seed=0)

    @torch.no_grad()
    def loss() -> float:
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction="none").double().mean().item()

    chosen = [one for one in anatomy(model).in_place("backbone") if one.role in ("o", "up", "down")][::5]
    dense, ratios, sums = loss(), [], [0.0, 0.0]
    for seed, one in enumerate(chosen):
        module = model.get_submodule(one.name)
        W = module.weight.detach().clone()
        D = normal(*W.shape, seed=seed).float()
        D *= 0.2 * W.norm() / D.norm()
        found = predicted(layer_metric(curvature(), one, statistics), D.double())
        measured = -dense
        for sign in (1, -1):
            module.weight.data = W + sign * D
            measured += loss() / 2
        module.weight.data = W
        ratios.append(found / measured)
        sums = [sums[0] + found, sums[1] + measured]
    assert len(ratios) > 3
    assert all(0.7 < ratio < 1.3 for ratio in ratios)
    assert sums[0] / sums[1] == pytest.approx(1, abs=0.15)
