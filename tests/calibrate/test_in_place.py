"""Models that write into tensors which linears gave or read, and callers that turn gradients off."""

import pytest
import torch
import transformers as hf
from torch import nn

import families
from compressed import low_rank, product
from curvatures import by_autograd, gather, text
from helpers.calibrated import assert_same_bits, tensors, tiny
from helpers.samples import word_tokenizer
from spectrim.calibrate import calibrate
from spectrim.errors import ModelError
from spectrim.pipeline import compress


@pytest.fixture
def options(words: str) -> dict:
    return {"processor": word_tokenizer(), "text": words, "images": None, "samples": 4, "seqlen": 8}


MOMENTS = {"gradients": True, "curvature": True}


def gemma3n() -> hf.PreTrainedModel:
    config = hf.Gemma3nTextConfig(
        **families.TEXT | {"intermediate_size": [96, 96], "head_dim": 16},
        vocab_size_per_layer_input=families.VOCAB,
        hidden_size_per_layer_input=16,
        altup_num_inputs=2,
        laurel_rank=8,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
    )
    torch.manual_seed(0)
    return hf.Gemma3nForCausalLM(config).eval()


def test_gradients_of_a_model_that_writes_into_what_its_linears_give():
    """Gemma 3n scales the output of a linear in place; against autograd without any hook."""
    model = gemma3n().double()
    ids = torch.tensor([3, 9, 27, 81, 4, 12])
    sums = gather(model, [text(ids)], fisher=True)
    model.requires_grad_(True)
    expected = by_autograd(model, text(ids))
    assert expected.keys() == sums.outputs.keys()
    once = {name for name, output in sums.outputs.items() if output.count == len(ids)}
    assert len(once) > len(expected) - 3  # the router of each layer runs twice
    for name in once:
        g, x, weight = expected[name]
        torch.testing.assert_close(sums.outputs[name].sums["output"], g.T @ g, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(sums.fisher[name], (weight / 5).square().sum(0), rtol=1e-6, atol=1e-12)
        assert float(sums.outputs[name].traces[3, 0]) == pytest.approx(float(x.square().sum()))


def test_the_default_recipe_takes_it(options):
    small = compress(gemma3n(), retain=0.6, **options)
    assert small(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all()


class Writing(nn.Module):
    """A feed-forward that scales what it was given after its linear has read it, and what its linears give."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(64, 96), nn.Linear(96, 64)
        self._in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up_proj(x)
        if not self._in_place:
            y = (y * 0.5 + 0.1) * x.sum(-1, keepdim=True).sigmoid()
            return self.down_proj(y) * 0.25 + x * 3
        y = y.mul_(0.5).add_(0.1) * x.sum(-1, keepdim=True).sigmoid()
        z = self.down_proj(y)
        y.zero_()
        return z.mul_(0.25).add_(x.mul_(3))


def written(in_place: bool) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**families.TEXT))
    for layer in model.model.layers:
        layer.mlp = Writing(in_place)
    return model.eval()


def test_what_a_linear_reads_is_what_it_read(options, tmp_path):
    """The same moments as of a model that computes the same without writing into anything."""
    for in_place in (True, False):
        calibrate(written(in_place), tmp_path / str(in_place), **options, **MOMENTS)
    one, two = tensors(tmp_path / "True"), tensors(tmp_path / "False")
    assert one.keys() == two.keys()
    assert any("up_proj.traces" in name for name in one)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-5, atol=1e-9 * float(two[name].abs().max()) + 1e-12)


@pytest.mark.parametrize("kind", ["anchored", "adacomp"])
def test_compensation_sees_what_linears_read_and_gave(kind, options):
    found = []
    for in_place in (True, False):
        changes = {"compensate.kind": kind}
        small = compress(written(in_place), recipe="svd-llm", retain=0.5, changes=changes, **options)
        found.append({name: product(layer).detach() for name, layer in low_rank(small).items()})
    assert found[0].keys() == found[1].keys()
    assert any(name.endswith("mlp.down_proj") for name in found[0])
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-3, atol=1e-3 * float(weight.abs().max()))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients_change_nothing(around, options, tmp_path):
    model = tiny("llama", torch.float32)
    calibrate(model, tmp_path / "plain", **options, **MOMENTS)
    with around():
        calibrate(model, tmp_path / "around", **options, **MOMENTS)
    assert_same_bits(tmp_path / "plain", tmp_path / "around")


def test_a_model_in_training_with_dropout_is_measured_without(options, tmp_path):
    torch.manual_seed(0)
    config = families.TEXT | {"attention_dropout": 0.5}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**config)).train()
    model.activation_checkpointing_enable()
    calibrate(model, tmp_path / "train", **options, **MOMENTS)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    calibrate(model.eval(), tmp_path / "eval", **options, **MOMENTS)
    assert_same_bits(tmp_path / "train", tmp_path / "eval")


def test_a_model_that_was_loaded_in_inference_mode_is_refused_at_once(options, tmp_path):
    with torch.inference_mode():
        model = tiny("llama", torch.float32)
    with pytest.raises(ModelError, match=r"was made under torch\.inference_mode\(\).*load the model outside of it"):
        calibrate(model, tmp_path / "s", **options, **MOMENTS)
    assert not (tmp_path / "s").exists()


class Rounded(torch.autograd.Function):
    """An operation without a derivative, as fused kernels for inference are."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("no derivative of this kernel\nand more lines")


def test_a_model_that_cannot_be_differentiated_is_a_sentence(options, tmp_path):
    model = tiny("llama", torch.float32)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: Rounded.apply(output))
    with pytest.raises(ModelError, match=r"cannot be differentiated \(no derivative of this kernel\); choose a recipe"):
        calibrate(model, tmp_path / "s", **options, **MOMENTS)
