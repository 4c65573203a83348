"""Code of models that uses the matrix of a linear outside its forward: found before planning, and kept dense."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional

from compressed import low_rank
from families import FAMILIES, TEXT, text_inputs
from spectrim import compress, load
from spectrim.anatomy import anatomy


def test_models_that_ask_for_dtypes_run(tmp_path: Path) -> None:
    config = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=128, **config)).eval()  # reads wo.weight.dtype
    ids = torch.tensor([[3, 4, 5]])
    small = compress(model, tmp_path / "a", recipe="svd", retain=0.6)
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in low_rank(small)
    again = hf.T5ForConditionalGeneration.from_pretrained(tmp_path / "a")
    given = {"input_ids": ids, "decoder_input_ids": ids}
    assert torch.equal(again(**given).logits, small(**given).logits)


TEXT_2 = {**TEXT, "num_hidden_layers": 2}
BASE = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "expert_layer_offset": 1}
RECURRENT: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "mamba": (lambda: hf.MambaForCausalLM(hf.MambaConfig(**BASE)), {"dt_proj"}),
    "falcon_mamba": (lambda: hf.FalconMambaForCausalLM(hf.FalconMambaConfig(**BASE)), {"dt_proj"}),
    "mamba2": (
        lambda: hf.Mamba2ForCausalLM(hf.Mamba2Config(**BASE, num_heads=8, head_dim=16, n_groups=1, state_size=16)),
        set(),
    ),
    "jamba": (
        lambda: hf.JambaForCausalLM(hf.JambaConfig(**TEXT_2, **JAMBA, use_mamba_kernels=False)),
        {"dt_proj"},
    ),
    "bamba": (lambda: hf.BambaForCausalLM(hf.BambaConfig(**TEXT_2, **STATE, attn_layer_indices=[1])), set()),
    "rwkv": (
        lambda: hf.RwkvForCausalLM(hf.RwkvConfig(**BASE, attention_hidden_size=64, context_length=64)),
        {"output", "value"},
    ),
}


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_models_compress_run_save_and_load(family: str, tmp_path: Path) -> None:
    make, expected = RECURRENT[family]
    torch.manual_seed(0)
    model = make().eval()
    kept = {x.name for x in anatomy(model).kept if x.reason == "its matrix is used outside its own forward"}
    assert {name.rpartition(".")[2] for name in kept} == expected
    small = compress(model, tmp_path / "a", recipe="svd", retain=0.6)
    assert low_rank(small)
    assert not kept & low_rank(small).keys()
    inputs = text_inputs(small)
    logits = small(**inputs).logits
    assert logits.isfinite().all()
    again = load(tmp_path / "a")
    assert torch.equal(again(**inputs).logits, logits)
    given = {**inputs, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert torch.equal(again.generate(**given), small.generate(**given))
    torch.testing.assert_close(again.dequantize()(**inputs).logits, logits, rtol=1e-3, atol=1e-4)


USES: dict[str, Callable[[nn.Linear, torch.Tensor], torch.Tensor]] = {
    "functional": lambda linear, x: functional.linear(x, linear.weight),
    "transposed": lambda linear, x: x @ linear.weight.T,
    "transposed in place of view": lambda linear, x: x @ linear.weight.transpose(0, 1),
    "left": lambda linear, x: (linear.weight @ x.mT).mT,
    "cast": lambda linear, x: functional.linear(x, linear.weight.to(x.dtype).contiguous()),
    "data": lambda linear, x: functional.linear(x, linear.weight.data),
    "keyword": lambda linear, x: functional.linear(input=x, weight=linear.weight),
    "among others": lambda linear, x: functional.linear(x, torch.cat([linear.weight] * 2)[:96]),
    "forward alone": lambda linear, x: linear.forward(x),  # no hook sees its input
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_use_of_the_matrix_is_found(use: str, where: str) -> None:
    with torch.device(where):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(USES[use](mlp.gate_proj, x)) * mlp.up_proj(x))
    parts = anatomy(model.train())
    assert [x.name for x in parts.kept if "outside" in x.reason] == ["model.layers.1.mlp.gate_proj"]
    assert "model.layers.1.mlp.gate_proj" not in {x.name for x in parts.linears}
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_reads_of_what_it_is_like_are_no_use() -> None:
    model = FAMILIES["llama"]()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(
        mlp.act_fn(mlp.gate_proj(x.to(mlp.gate_proj.weight.dtype).to(mlp.up_proj.weight.device)))
        * mlp.up_proj(x)
        * mlp.gate_proj.weight.shape[0]
        / mlp.gate_proj.weight.size(0)
    )
    assert not [x for x in anatomy(model).kept if "outside" in x.reason]


def test_a_decoder_beside_its_encoder_is_traced() -> None:
    config = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=128, **config)).eval()
    attention = model.decoder.block[1].layer[1].EncDecAttention
    project = attention.o.forward
    attention.o.forward = lambda x: project(x) + 0 * attention.v.weight.sum()
    parts = anatomy(model)
    assert [x.name for x in parts.kept if "outside" in x.reason] == ["decoder.block.1.layer.1.EncDecAttention.v"]


def test_a_model_that_does_not_run_on_tokens_is_a_line_of_logging(caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["llama"]()
    count = len(anatomy(FAMILIES["llama"]()).linears)
    model.forward = lambda **inputs: 1 / 0
    with caplog.at_level(logging.INFO, "spectrim"):
        assert len(anatomy(model).linears) == count
    assert caplog.messages == ["LlamaForCausalLM was not traced for uses of its weights: division by zero"]


def test_no_random_number_is_drawn() -> None:
    model = FAMILIES["llama"]()
    state = torch.get_rng_state()
    forward = model.forward
    model.forward = lambda **inputs: (torch.rand(3), forward(**inputs))[1]
    anatomy(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "parametrized", "pruned"])
def test_a_weight_that_is_computed_is_kept(how: str) -> None:
    from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

    model = FAMILIES["llama"]()
    linear = model.model.layers[0].mlp.up_proj
    {
        "weight_norm": weight_norm,
        "spectral_norm": spectral_norm,
        "parametrized": parametrizations.weight_norm,
        "pruned": lambda linear: prune.random_unstructured(linear, "weight", amount=0.5),
    }[how](linear)
    parts = anatomy(model)
    assert "model.layers.0.mlp.up_proj" not in {x.name for x in parts.linears}
    reasons = {x.reason for x in parts.kept if x.name.startswith("model.layers.0.mlp.up_proj")}
    assert len(reasons) == 1 if how != "parametrized" else reasons
    assert len(parts.linears) == 13
