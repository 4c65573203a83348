from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from compressed import MAIN, config_of, edited, factored, logits, low_rank, product
from families import FAMILIES, example_inputs, text_inputs
from spectrim.anatomy import anatomy
from spectrim.checkpoint import (
    attach,
    checkpoint_names,
    load,
    runtime_names,
    save,
)
from spectrim.errors import ModelError

forms = pytest.mark.parametrize("form", ["whole", "headwise", "pivoted"])


@pytest.fixture(scope="module", params=["whole", "headwise", "pivoted"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved compressed language model; tests that change it work on a copy."""
    model = factored("llama", form=request.param)
    return save(model, tmp_path_factory.mktemp("llama") / "small", provenance={"recipe": "svd"})


# ---- the same model comes back ----


@pytest.mark.parametrize("family", FAMILIES)
def test_reloaded_logits_are_equal_to_the_last_bit(family: str, tmp_path: Path) -> None:
    model = factored(family, form="mixed")
    expected = logits(model)
    assert expected.isfinite().all()
    ranks = {name: layer.rank for name, layer in low_rank(model).items()}
    save(model, tmp_path / "a")
    again = load(tmp_path / "a")
    assert type(again) is type(model)
    assert {name: layer.rank for name, layer in low_rank(again).items()} == ranks
    if any(x.expert is not None for x in anatomy(model).linears):  # run at once where they lie side by side in memory
        torch.testing.assert_close(logits(again), expected, atol=1e-6, rtol=1e-5)
    else:
        assert torch.equal(logits(again), expected)
    assert not again.training


@pytest.mark.parametrize("family", MAIN)
@forms
def test_plain_transformers_does_the_same(family: str, form: str, tmp_path: Path) -> None:
    model = attach(factored(family, form=form))
    model.save_pretrained(tmp_path)
    auto = hf.AutoModelForCausalLM if family == "llama" else hf.AutoModelForImageTextToText
    again, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert low_rank(again).keys() == low_rank(model).keys()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", MAIN)
@forms
def test_saving_what_was_loaded_changes_no_byte(family: str, form: str, tmp_path: Path) -> None:
    model = factored(family, form=form)
    fresh = save(model, tmp_path / "fresh")  # transformers notes the dtype of sub-configs on loading
    first = save(load(fresh), tmp_path / "a")
    second = save(load(first), tmp_path / "b")
    assert (fresh / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


@pytest.mark.parametrize("family", MAIN)
@forms
def test_low_precision_keeps_its_dtype(family: str, form: str, tmp_path: Path) -> None:
    FAMILIES[family]().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = factored(family, model=load(tmp_path / "dense"), form=form)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    save(model, tmp_path / "a")
    again = load(tmp_path / "a")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(again), logits(model))
    wide = load(tmp_path / "a", dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}


@forms
def test_tied_weights_stay_tied(form: str, tmp_path: Path) -> None:
    model = factored("qwen2", form=form)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save(model, tmp_path / "a")
    assert not any("lm_head" in name for name in load_file(tmp_path / "a" / "model.safetensors"))
    again = load(tmp_path / "a")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", MAIN)
@forms
def test_shards(family: str, form: str, tmp_path: Path) -> None:
    model = factored(family, form=form)
    save(model, tmp_path / "a", max_shard_size="60KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "a")), logits(model))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(llama: Path, device_map: Any) -> None:
    model = load(llama, device_map=device_map)
    assert torch.equal(logits(model), logits(load(llama)))


def test_weights_offloaded_to_disk_run_but_cannot_be_merged(llama: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load(llama, device_map=places, offload_folder=tmp_path)
    assert low_rank(model)["model.layers.1.mlp.up_proj"].A.weight.is_meta
    assert torch.equal(logits(model), logits(load(llama)))
    with pytest.raises(ModelError, match="without offloading"):
        model.dequantize()


@pytest.mark.parametrize("family", MAIN)
@forms
def test_generates_the_same_tokens(family: str, form: str, tmp_path: Path) -> None:
    model = factored(family, form=form)
    inputs = example_inputs(model)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    save(model, tmp_path / "a")
    again = load(tmp_path / "a")
    assert torch.equal(again.generate(**inputs, **settings), expected)


def test_generation_config_travels(tmp_path: Path) -> None:
    model = factored("llama")
    model.generation_config = hf.GenerationConfig(do_sample=True, temperature=0.7, top_k=11, eos_token_id=[2, 5])
    save(model, tmp_path / "a")
    again = load(tmp_path / "a").generation_config
    assert (again.do_sample, again.temperature, again.top_k, again.eos_token_id) == (True, 0.7, 11, [2, 5])


def test_factors_are_trainable(llama: Path) -> None:
    model = load(llama)
    inputs = text_inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in low_rank(model).values():
        assert all(parameter.grad.any() for parameter in (*layer.A.parameters(), *layer.B.parameters()))
    assert model.hf_quantizer.is_trainable
    assert model.half().dtype == torch.float16  # transformers forbids it for quantized models


# ---- names ----


def test_names_of_qwen2_5_vl(tmp_path: Path) -> None:
    model = FAMILIES["qwen2_5_vl"]()
    names = checkpoint_names(model)
    assert names["model.language_model.layers.1.self_attn.q_proj"] == "model.layers.1.self_attn.q_proj"
    assert names["model.visual.blocks.0.attn.qkv"] == "visual.blocks.0.attn.qkv"
    assert names["model.visual.merger.mlp.0"] == "visual.merger.mlp.0"
    assert names["lm_head"] == "lm_head"
    ranks = config_of(save(factored("qwen2_5_vl"), tmp_path / "a"))["quantization_config"]["ranks"]
    assert ranks["model.layers.1.self_attn.q_proj"] == 64 // 3
    assert not any(name.startswith("model.language_model") for name in ranks)
    apart = config_of(save(factored("qwen2_5_vl", form="headwise"), tmp_path / "b"))["quantization_config"]["ranks"]
    assert apart["model.layers.1.self_attn.q_proj"] == [5, 6, 7, 8]  # query heads
    assert apart["model.layers.1.self_attn.k_proj"] == apart["model.layers.1.self_attn.v_proj"] == [5, 6]
    assert apart.keys() == ranks.keys()
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert {n: tuple(t.shape) for n, t in stored.items() if n.startswith("model.layers.1.self_attn.v_proj")} == {
        "model.layers.1.self_attn.v_proj.A.0.weight": (16, 5),
        "model.layers.1.self_attn.v_proj.A.1.weight": (16, 6),
        "model.layers.1.self_attn.v_proj.B.weight": (11, 64),
        "model.layers.1.self_attn.v_proj.bias": (32,),
        "model.layers.1.self_attn.v_proj.weight": (0,),
    }


def test_names_of_llava() -> None:
    names = checkpoint_names(FAMILIES["llava"]())
    assert names["model.language_model.layers.0.mlp.up_proj"] == "language_model.model.layers.0.mlp.up_proj"
    assert names["model.multi_modal_projector.linear_1"] == "multi_modal_projector.linear_1"
    assert names["model.vision_tower.encoder.layers.0.mlp.fc1"] == "vision_tower.encoder.layers.0.mlp.fc1"
    assert names["lm_head"] == "language_model.lm_head"


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_the_files_and_lead_back(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    linears = {linear.name for linear in anatomy(model).linears}
    names = checkpoint_names(model)
    assert names.keys() >= linears
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    if family == "qwen3_vl_moe":  # whose files have fused experts
        linears = {name for name in linears if ".experts." not in name}
    for name in linears:
        assert torch.equal(stored[f"{names[name]}.weight"], model.get_submodule(name).weight)
    assert runtime_names(model, names.values()) == {stored_name: name for name, stored_name in names.items()}


@forms
def test_names_follow_the_file_that_the_model_came_from(form: str, tmp_path: Path) -> None:
    """Published LLaVA files have one more prefix in the tower, which transformers 5 drops at run time."""
    dense = FAMILIES["llava"]()
    dense.save_pretrained(tmp_path)
    with edited(tmp_path) as tensors:
        for name in [name for name in tensors if name.startswith("vision_tower.")]:
            tensors[name.replace("vision_tower.", "vision_tower.vision_model.")] = tensors.pop(name)
    model = factored("llava", model=load(tmp_path), form=form)
    expected = logits(model)
    ranks = config_of(save(model, tmp_path / "a"))["quantization_config"]["ranks"]
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1" in ranks
    assert "vision_tower.encoder.layers.0.mlp.fc1" not in ranks
    assert torch.equal(logits(load(tmp_path / "a")), expected)


# ---- back to dense ----


@pytest.mark.parametrize("family", MAIN)
@forms
def test_dequantize_multiplies_the_factors_and_leaves_a_plain_model(family: str, form: str, tmp_path: Path) -> None:
    model = load(save(factored(family, form=form), tmp_path / "a"))
    products = {name: product(layer) for name, layer in low_rank(model).items()}
    biases = {name: layer.bias for name, layer in low_rank(model).items()}
    before = logits(model)
    assert model.dequantize() is model
    for name, expected in products.items():
        linear = model.get_submodule(name)
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight, expected)
        assert (linear.bias is None) == (biases[name] is None)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "dense")
    assert not {"quantization_config", "fusion_config"} & config_of(tmp_path / "dense").keys()
    dense = load(tmp_path / "dense")
    assert not low_rank(dense)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-6, atol=1e-7)


@forms
def test_dequantize_before_saving_and_to_another_dtype(form: str) -> None:
    model = attach(factored("llama", form=form))
    model.dequantize(dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    with pytest.raises(ValueError, match="first quantize"):
        model.dequantize()
