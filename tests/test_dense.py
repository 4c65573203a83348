"""Models that are quantized already are refused before anything is read or computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from torch import nn

from compressed import config_of, edited, factored
from families import FAMILIES
from helpers.samples import word_tokenizer
from spectrim.calibrate import calibrate
from spectrim.checkpoint import load, save
from spectrim.dense import check_dense
from spectrim.errors import ModelError, RecipeError
from spectrim.pipeline import compress

LAYER = "model.layers.0.self_attn.q_proj.weight"


def config(part: str | None, quantization: Any, key: str = "quantization_config") -> hf.PreTrainedConfig:
    """A config as `AutoConfig` gives it, with this entry in itself or in one of its parts."""
    whole = FAMILIES["llava"]().config
    setattr(whole if part is None else getattr(whole, part), key, quantization)
    return whole


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fp8", "dequantize": False}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "of tomorrow"}, "of tomorrow"),
        ({"bits": 4}, "unknown"),
        (hf.BitsAndBytesConfig(load_in_4bit=True), "bitsandbytes"),
        (hf.GPTQConfig(bits=4), "gptq"),
    ],
)
def test_a_config_alone_tells(part: str | None, quantization: Any, method: str) -> None:
    with pytest.raises(ModelError, match=rf"already quantized \(quant_method '{method}'.*; start from the model in"):
        check_dense(config(part, quantization))


def test_configs_of_dense_models_pass() -> None:
    for family in ("llama", "llava", "qwen2_5_vl"):
        check_dense(FAMILIES[family]().config)
        check_dense(FAMILIES[family]())
    for quantization in (None, {"quant_method": "fp8", "dequantize": True}, hf.FineGrainedFP8Config(dequantize=True)):
        check_dense(config(None, quantization))
    with pytest.raises(ModelError, match="compressed-tensors"):
        check_dense(config(None, {"quant_method": "compressed-tensors"}, "compression_config"))


def test_spectrims_own_format(tmp_path: Path) -> None:
    small = load(save(factored("llama"), tmp_path / "small"))
    for model in (small, small.config):
        with pytest.raises(ModelError, match="compressed already; start from the dense model, or dequantize it first"):
            check_dense(model)
    with pytest.raises((ModelError, RecipeError), match="compressed already"):
        compress(small, recipe="svd", retain=0.6)
    check_dense(small.dequantize())


def packed_model(directory: Path) -> hf.PreTrainedModel:
    """Eight-bit integers of compressed-tensors, loaded from a directory."""
    model = FAMILIES["llama"]().to(torch.bfloat16)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    scheme = {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    apply_quantization_config(
        model, QuantizationConfig(**scheme, format="pack-quantized", quantization_status="compressed")
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.abs().amax(1, keepdim=True) / 127)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    return load(directory)


def test_every_way_in_refuses_packed_integers(tmp_path: Path) -> None:
    model = packed_model(tmp_path / "packed")
    said = r"already quantized \(quant_method 'compressed-tensors'"
    for recipe in ("svd", "svd-llm"):
        with pytest.raises(ModelError, match=said):
            compress(model, tmp_path / "out", recipe=recipe, retain=0.6)
    with pytest.raises(ModelError, match=said):
        compress(str(tmp_path / "packed"), tmp_path / "out", recipe="svd", retain=0.6, processor=word_tokenizer())
    with pytest.raises(ModelError, match=said):
        calibrate(model, tmp_path / "stats", processor=word_tokenizer())
    model(input_ids=torch.tensor([[3, 4]]))  # which unpacks them
    with pytest.raises(ModelError, match=said):
        compress(model, recipe="svd", retain=0.6)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    del model.config.quantization_config
    model = packed_model(tmp_path / "again")
    del model.config.quantization_config
    with pytest.raises(ModelError, match=r"already quantized \(model\.layers\.0\.\S+ is \w+\)"):
        check_dense(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_modules_of_packed_weights_are_known_without_a_config(dtype: torch.dtype) -> None:
    model = FAMILIES["llama"]()
    linear = model.model.layers[0].self_attn.q_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ModelError, match=f"q_proj.weight is {str(dtype).removeprefix('torch.')}"):
        check_dense(model)


# ---- numbers without a meaning in files ----


@pytest.mark.parametrize("how", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_not_taken_for_weights(tmp_path: Path, dtype: torch.dtype, how: str) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path)
    with edited(tmp_path) as tensors:
        tensors[LAYER] = tensors[LAYER].to(dtype)
        tensors["model.layers.0.self_attn.mask"] = torch.ones(3, 3, dtype=torch.uint8)  # as GPT-2's
    if how == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=rf"holds {LAYER} as .*no quantization_config.*; start from the model in"):
        load(tmp_path)
    settings = config_of(tmp_path) | {"quantization_config": {"quant_method": "of tomorrow"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))  # whose loader would take them for weights, too
    with pytest.raises(ModelError, match=f"holds {LAYER} as"):
        load(tmp_path)


def test_buffers_of_other_kinds_are_no_weights(tmp_path: Path) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path)
    with edited(tmp_path) as tensors:
        tensors["model.layers.0.self_attn.mask"] = torch.ones(3, 3, dtype=torch.uint8)
        tensors["model.layers.0.self_attn.count"] = torch.ones((), dtype=torch.int64)
    load(tmp_path)


def test_a_weight_of_zeros_is_odd_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["llama"]()
    nn.init.zeros_(model.get_parameter(LAYER))
    compress(model, recipe="svd", retain=0.6)
    (record,) = caplog.records
    assert record.getMessage() == f"{LAYER.removesuffix('.weight')}: all weights are zero; was it ever trained?"
    caplog.clear()
    compress(FAMILIES["llama"](), recipe="svd", retain=0.6)
    assert not caplog.records
