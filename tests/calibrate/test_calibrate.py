"""Calibration: moments and gradients against independent computations, and which linears share them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import families
from helpers.calibrated import record_inputs, tiny
from helpers.samples import calibrated_windows, llava_processor, noise, word_tokenizer
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate, hooks
from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.gradients import GradientWatch
from spectrim.calibrate.moments import Sums
from spectrim.calibrate.passes import prepared, run_batch
from spectrim.calibrate.positions import Positions
from spectrim.errors import ModelError
from spectrim.samples import Batch

CPU = torch.device("cpu")


def gather(model, *inputs, modality="image", **options) -> Sums:
    sums = Sums(CPU)
    modules = {linear: model.get_submodule(linear.name) for linear in anatomy(model).linears}
    with prepared(model):
        for one in inputs:
            run_batch(model, modules, Batch(modality, one, len(one["input_ids"])), sums, **options)
    return sums


def assert_moment(moment, rows: np.ndarray, tolerance: float = 1e-10) -> None:
    assert moment.count == len(rows)
    second, abs_sum = rows.T @ rows, np.abs(rows).sum(0)
    assert np.abs(moment.second.numpy() - second).max() <= tolerance * second.max()
    assert np.abs(moment.abs_sum.numpy() - abs_sum).max() <= tolerance * abs_sum.max()


@pytest.mark.parametrize("family", [family for family in families.FAMILIES if family != "mllama"])
def test_moments_are_those_of_the_recorded_inputs(family):
    fused = family in ("qwen3_moe", "qwen3_vl_moe", "mixtral")  # torch multiplies grouped experts in float32 at most
    model = tiny(family, torch.float32 if fused else torch.float64)
    batches = [families.example_inputs(model, batch=2, seed=seed) for seed in (0, 5)]
    sums = gather(model, *batches)
    recorded = [record_inputs(model, inputs) for inputs in batches]
    assert recorded[0].keys() | recorded[1].keys() == sums.owners.keys()
    for name, owner in sums.owners.items():
        rows = np.concatenate([x for one in recorded for x in one.get(name, [])])
        assert_moment(sums.moments[owner], rows, 1e-6 if fused else 1e-10)


def test_linears_that_read_the_same_input_share_a_moment():
    model = tiny("qwen2_5_vl")
    owners = gather(model, families.example_inputs(model)).owners
    layer, block = "model.language_model.layers.1", "model.visual.blocks.0"
    assert owners[f"{layer}.self_attn.k_proj"] == owners[f"{layer}.self_attn.v_proj"] == f"{layer}.self_attn.q_proj"
    assert owners[f"{layer}.mlp.up_proj"] == f"{layer}.mlp.gate_proj"
    assert owners[f"{block}.mlp.up_proj"] == f"{block}.mlp.gate_proj"
    for alone in (f"{layer}.self_attn.o_proj", f"{layer}.mlp.down_proj", f"{block}.attn.qkv", f"{block}.attn.proj"):
        assert owners[alone] == alone


def test_cross_attention_keys_and_values_share_the_vision_states():
    model = tiny("mllama")
    owners = gather(model, families.example_inputs(model)).owners
    attention = "model.language_model.layers.1.cross_attn"
    assert owners[f"{attention}.q_proj"] == f"{attention}.q_proj"
    assert owners[f"{attention}.k_proj"] == owners[f"{attention}.v_proj"] == f"{attention}.k_proj"
    text = gather(model, families.text_inputs(model), modality="text")
    assert f"{attention}.k_proj" not in text.owners


class Pair(nn.Module):
    """Two linears that read the same tensor, a copy of it, or the same memory after a write."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x, how):
        y = self.a(x)
        if how == "copy":
            x = x.clone()
        if how == "write":
            x.mul_(2)
        return y + self.b(x.view(x.shape) if how == "view" else x)


def watched(model, how, sums, x):
    modules = {linear: model.get_submodule(linear.name) for linear in anatomy(model).linears}
    with torch.no_grad(), hooks.Watch(modules, sums, Positions((1, 1), None, None, 0)) as watch:
        model(x, how)
    watch.finish("batch")


@pytest.mark.parametrize(("how", "owner"), [("same", "a"), ("view", "a"), ("copy", "b"), ("write", "b")])
def test_sharing_is_by_identity_of_the_input(how, owner):
    sums, model, x = Sums(CPU), Pair(), torch.randn(5, 3)
    watched(model, how, sums, x)
    assert sums.owners == {"a": "a", "b": owner}


def test_sharing_that_ends_is_an_error():
    sums, model = Sums(CPU), Pair()
    watched(model, "same", sums, torch.randn(5, 3))
    with pytest.raises(ModelError, match="b read the same input as a in the first batch"):
        watched(model, "copy", sums, torch.randn(5, 3))


def test_padding_does_not_count():
    model = tiny("llama")
    rows = [families.text_inputs(model, length=n, seed=n)["input_ids"] for n in (9, 5, 12)]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : row.shape[1]], mask[i, : row.shape[1]] = row, 1
    padded = gather(model, {"input_ids": ids, "attention_mask": mask})
    alone = gather(model, *({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows))
    for name, moment in alone.moments.items():
        assert padded.moments[name].count == moment.count == 26
        torch.testing.assert_close(padded.moments[name].second, moment.second)


def test_padding_of_mllama_tiles_does_not_count():
    model = tiny("mllama")
    inputs = families.example_inputs(model, batch=2)
    inputs["aspect_ratio_ids"] = torch.tensor([[1], [2]])
    inputs["aspect_ratio_mask"] = torch.tensor([[[1, 0]], [[1, 1]]])
    inputs["cross_attention_mask"][0, ..., 1] = 0
    sums, recorded = gather(model, inputs), record_inputs(model, inputs)
    for linear in anatomy(model).linears:
        (rows,) = recorded[linear.name]
        if linear.place != "backbone" or linear.name.endswith(("cross_attn.k_proj", "cross_attn.v_proj")):
            tiles = rows.reshape(4, -1, linear.in_features)  # two images of two tiles each
            assert tiles.shape[1] == (24 if linear.place == "tower" else 17)  # 4 × 4 patches, 1 class token, filling
            rows = tiles[[0, 2, 3], :17].reshape(-1, linear.in_features)
        assert_moment(sums.moments[sums.owners[linear.name]], rows)


def test_image_tokens_only(pictures, words, tmp_path):
    model = tiny("llava")
    options = {"processor": llava_processor(), "text": words, "images": pictures, "samples": 6, "seqlen": 8}
    every = calibrate(model, tmp_path / "every", **options)
    only = calibrate(model, tmp_path / "only", **options, image_tokens_only=True)
    down = "model.language_model.layers.1.mlp.down_proj"
    sums = np.zeros((96, 96))
    for number in range(6):
        ids = torch.tensor([[1, *[120] * 16, *[7] * (1 + number % 3), 99]])
        pixels = llava_processor().image_processor(noise(number), return_tensors="pt")["pixel_values"]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        rows = record_inputs(model, inputs)[down][0]
        sums += rows[1:17].T @ rows[1:17]
    moment = only.moment(down, "image")
    assert moment.count == 6 * 16
    np.testing.assert_allclose(moment.second.numpy(), sums, rtol=1e-9, atol=1e-12)
    assert every.moment(down, "image").count == 6 * 18 + (0 + 1 + 2 + 0 + 1 + 2) + 6
    tower = anatomy(model).in_place("tower")[0].name
    assert torch.equal(only.moment(tower, "image").second, every.moment(tower, "image").second)
    assert torch.equal(only.moment(down, "text").second, every.moment(down, "text").second)


def test_samples_of_mixed_length_equal_the_sum_of_each_alone(pictures, tmp_path):
    model = tiny("llava")
    options = {"processor": llava_processor(), "text": None, "images": pictures, "samples": 6}
    together = calibrate(model, tmp_path / "a", **options, batch_size=3)
    alone = calibrate(model, tmp_path / "b", **options, batch_size=1)
    assert together.manifest.gathered["image"].batches < alone.manifest.gathered["image"].batches == 6
    assert "text" not in alone.manifest.gathered
    for linear in anatomy(model).linears:
        a, b = together.moment(linear.name, "image"), alone.moment(linear.name, "image")
        assert a.count == b.count
        torch.testing.assert_close(a.second, b.second, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a.abs_sum, b.abs_sum, rtol=1e-10, atol=1e-10)
        assert alone.moment(linear.name, "text") is None


def test_bf16_inputs_are_summed_in_high_precision(words, tmp_path):
    model = tiny("llama", torch.bfloat16)
    statistics = calibrate(model, tmp_path / "s", processor=word_tokenizer(), text=words, samples=8, seqlen=16)
    windows = calibrated_windows(words, samples=8, seqlen=16)
    recorded = record_inputs(model, {"input_ids": windows, "attention_mask": torch.ones_like(windows)})
    for name, rows in recorded.items():
        moment = statistics.moment(name, "text")
        assert_moment(moment, rows[0], tolerance=1e-6)
        assert torch.equal(moment.second, moment.second.T)


@pytest.mark.parametrize("family", ["llama", "llava", "opt"])
def test_fisher_is_that_of_autograd(family, words, tmp_path):
    model = tiny(family)
    options = {"processor": word_tokenizer(), "text": words, "images": None, "samples": 3, "seqlen": 10}
    statistics = calibrate(model, tmp_path / "s", **options, gradients=True)
    expected = {linear.name: torch.zeros(linear.in_features) for linear in anatomy(model).in_place("backbone")}
    for ids in calibrated_windows(words, samples=3, seqlen=10):
        model.zero_grad()
        logits = model(input_ids=ids[None]).logits[0]
        functional.cross_entropy(logits[:-1], ids[1:]).backward()
        for name in expected:
            expected[name] = expected[name] + model.get_submodule(name).weight.grad.square().sum(0)
    for name, columns in expected.items():
        gradient = statistics.gradient(name, "text")
        assert gradient.count == 3
        torch.testing.assert_close(gradient.fisher_cols, columns, rtol=1e-6, atol=0)  # norms compute in float32
        assert statistics.gradient(name, "image") is None
        assert statistics.moment(name, "text").count == 30
    for linear in anatomy(model).in_place("tower"):
        assert statistics.gradient(linear.name, "text") is None


class Twice(nn.Module):
    """A linear that runs twice in one pass."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.a(self.a(x).tanh())


def test_a_linear_that_runs_twice_is_one_gradient():
    model, x, sums = Twice().double(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True), Sums(CPU)
    calls = []
    model.a.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append(grad_out[0]))
    model(x).square().sum().backward()
    gradient, expected = model.a.weight.grad, sum(g.T @ g for g in calls)
    model.requires_grad_(False)
    everything, linear = Positions((1, 4), None, None, 0), anatomy(model).linears[0]
    with GradientWatch({linear: model.a}, sums, everything, {"a": CurvatureForm("full")}, fisher=[1.0]) as watch:
        model(x).square().sum().backward()
    watch.finish("sample")
    torch.testing.assert_close(sums.fisher["a"], gradient.square().sum(0))
    torch.testing.assert_close(sums.outputs["a"].sums["output"], expected)
    torch.testing.assert_close(sums.outputs["a"].traces[1, 0], gradient.square().sum())
    assert sums.outputs["a"].count == 8
    with hooks.Watch({linear: model.a}, sums, everything) as plain:
        model(x)
    plain.finish("batch")
    assert sums.moments["a"].count == 8
