"""Integer linears: the tensors of compressed-tensors, from disk and back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from compressed import PACKED_FORMS, config_of, edited, grid_of, logits, pack_nearest, packed
from families import FAMILIES
from spectrim.anatomy import anatomy
from spectrim.checkpoint import SpectrimConfig, attach, load, save
from spectrim.errors import CheckpointError, ModelError
from spectrim.maths.rotation import turned_back
from spectrim.maths.rounding import Grid, quantize
from spectrim.storage.layers import LowRankLinear
from spectrim.storage.packed import PackedLinear, inner_config, inner_grids, pack, unpack


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 8), st.integers(1, 40), st.sampled_from([32, 48, 64]), st.booleans(), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_a_layer_computes_what_its_codes_say(bits, out, size, symmetric, bias, dtype):
    generator = torch.Generator().manual_seed(bits + out)
    W = torch.randn(out, size, generator=generator)
    found = quantize(W, grid_of(size, bits, symmetric), dtype=dtype)
    layer = PackedLinear(size, out, found.grid, bias, dtype=dtype)
    assert layer.weight.isnan().all()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    layer.load(found)
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(
        layer.weight.double(), found.dense(), rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0
    )
    x = torch.randn(3, size, generator=generator).to(dtype)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.to_dense()(x), expected)
    # The bytes that a plan counts are those of the tensors.
    stored = sum(tensor.nbytes for name, tensor in layer.state_dict().items() if name != "bias")
    assert stored == found.grid.nbytes(out, size, dtype.itemsize)
    layer.loaded()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_a_row_of_codes_is_one_long_number(bits, rows, count, seed):
    """The file's layout, whatever release of compressed-tensors is installed: each code above the one before it."""
    half = 1 << bits - 1
    codes = torch.randint(-half, half, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    words = pack(codes, bits)
    assert words.shape == (rows, -(-count * bits // 32))
    assert words.dtype == torch.int32
    for row, numbers in zip(words, codes.tolist(), strict=True):
        whole = sum((code + half) << bits * j for j, code in enumerate(numbers))
        assert int.from_bytes(row.numpy().tobytes(), "little") == whole
    assert torch.equal(unpack(words, bits, count), codes)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.integers(1, 40), st.sampled_from([1, 2, 3, 5]), st.booleans())
def test_layers_of_any_width_and_number_of_groups(bits, out, groups, symmetric):
    """Few outputs make one word of zero points, whose column may have any stride."""
    W = torch.randn(out, 16 * groups, generator=torch.Generator().manual_seed(out))
    found = quantize(W, Grid(bits, 16, symmetric), dtype=torch.float32)
    layer = PackedLinear(16 * groups, out, found.grid, bias=False)
    layer.load(found)
    torch.testing.assert_close(layer.weight.double(), found.dense(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 10**9}, "asks for 1000000000 bits"),
        ({"num_bits": 0}, "asks for 0 bits"),
        ({"num_bits": -4}, "asks for -4 bits"),
        ({"num_bits": True}, "asks for 1 bits"),
        ({"num_bits": 16}, "asks for 16 bits"),
        ({"group_size": 10**9, "strategy": "group"}, "groups of 1000000000 do not divide"),
        ({"group_size": 48, "strategy": "group"}, "groups of 48 do not divide"),
        ({"group_size": None, "strategy": "tensor"}, "by tensor"),
        ({"group_size": None, "strategy": "block", "block_structure": [16, 16]}, "by block"),
        ({"group_size": 0, "strategy": "group"}, "none of compressed-tensors"),
        ({"num_bits": 8}, "weight_packed.* in another shape"),
        ({"group_size": 16, "strategy": "group"}, "weight_scale.* in another shape"),
        ({"symmetric": False}, "weight_zero_point"),
    ],
)
def test_grids_that_do_not_fit_are_an_error(change, message, tmp_path):
    model = FAMILIES["llama"]()
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    pack_nearest(model, dict.fromkeys(names, Grid(4, 32)))
    directory = save(model, tmp_path / "a")
    config = config_of(directory)
    config["quantization_config"]["inner"]["config_groups"]["group_0"]["weights"].update(change)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_targets_that_repeat_or_do_not_exist_are_an_error(tmp_path):
    model, name = FAMILIES["llama"](), "model.layers.0.mlp.up_proj"
    pack_nearest(model, {name: Grid(4, 32)})
    directory = save(model, tmp_path / "a")
    original = config_of(directory)
    for targets, message in (
        ([name, name], f"names '{name}' twice"),
        ([name, "model.layers.7.mlp.up_proj"], r"lacks the tensor model\.layers\.7\.mlp\.up_proj"),
        ([f"{name}.A"], "lacks"),
        (["Linear"], "lacks the tensor Linear"),
    ):
        config = json.loads(json.dumps(original))
        config["quantization_config"]["inner"]["config_groups"]["group_0"]["targets"] = targets
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            load(directory)
    config = json.loads(json.dumps(original))
    groups = config["quantization_config"]["inner"]["config_groups"]
    groups["group_1"] = groups["group_0"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"names '{name}' twice"):
        load(directory)


def test_codes_of_another_kind_are_an_error(tmp_path):
    model, name = FAMILIES["llama"](), "model.layers.0.mlp.up_proj"
    pack_nearest(model, {name: Grid(4, 32)})
    directory = save(model, tmp_path / "a")
    with edited(directory) as tensors:
        tensors[f"{name}.weight_packed"] = tensors[f"{name}.weight_packed"].float()
    with pytest.raises(
        CheckpointError, match=f"holds {name}.weight_packed as F32, which should be integers; copy it again"
    ):
        load(directory)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ModelError, match="groups of 32 do not divide 48 inputs"):
        PackedLinear(48, 8, Grid(4, 32))
    layer = PackedLinear(32, 8, Grid(4, 32))
    with pytest.raises(ModelError, match="do not fit a layer"):
        layer.load(quantize(torch.randn(8, 32), Grid(3, 32)))
    layer.weight_shape.copy_(torch.tensor([8, 64]))
    with pytest.raises(ModelError, match=r"weight_shape: it is \[8, 64\], not \[8, 32\]"):
        layer.loaded()
    PackedLinear(32, 8, Grid(4, 32), device="meta").loaded()  # nothing to compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_from_disk_and_back(family, dtype, tmp_path):
    FAMILIES[family]().to(dtype).save_pretrained(tmp_path / "dense")
    model = packed(family, load(tmp_path / "dense"))
    expected = logits(model)
    assert expected.isfinite().all()
    first = save(model, tmp_path / "a")
    torch.testing.assert_close(logits(load(first)), expected, rtol=0.1, atol=0.1)  # kernels of their own
    again = load(first, runtime="reference")
    assert torch.equal(logits(again), expected)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert {name: type(module) for name, module in again.named_modules()} == kinds
    second = save(again, tmp_path / "b")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert config_of(first)["quantization_config"] == config_of(second)["quantization_config"]
    # Integers and factors are merged into one dense weight each.
    again.dequantize()
    assert not any(isinstance(module, PackedLinear | LowRankLinear) for module in again.modules())
    torch.testing.assert_close(logits(again), expected, rtol=1e-4 if dtype == torch.float32 else 0.1, atol=0.05)


def test_compressed_tensors_reads_the_same_weights(tmp_path):
    """Names, tensors and config, read by compressed-tensors alone, but for rotations, which stand apart in ours."""
    model = packed("llama")
    directory = save(model, tmp_path / "a")
    rotated = config_of(directory)["quantization_config"]["rotated"]
    config = QuantizationConfig.model_validate(config_of(directory)["quantization_config"]["inner"])
    tensors, seen = load_file(directory / "model.safetensors"), 0
    for group in config.config_groups.values():
        for target in group.targets:
            stored = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.rpartition(".")[0] == target}
            assert stored.keys() - {"weight", "bias"} == {*PackedQuantizationCompressor.compression_param_names(group)}
            stored = {name: tensor for name, tensor in stored.items() if name not in ("weight", "bias")}
            weight = PackedQuantizationCompressor.decompress(stored, group)["weight"]
            assert torch.equal(turned_back(weight) if target in rotated else weight, model.get_submodule(target).weight)
            seen += 1
    assert 0 < len(rotated) < seen
    assert seen == sum(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.slow
def test_a_fresh_process_computes_the_same(tmp_path):
    model = packed("llama")
    save(model, tmp_path / "a")
    torch.save(logits(model), tmp_path / "expected.pt")
    code = (
        "import sys, torch, spectrim\nfrom transformers import AutoModelForCausalLM\nfrom compressed import logits\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/a')\n"
        "assert torch.equal(logits(model), torch.load(sys.argv[1] + '/expected.pt'))\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, env={**os.environ, "PYTHONPATH": paths})


@pytest.mark.parametrize("family", ["llama"])
def test_damage_is_named(family, tmp_path):
    model = packed(family)
    save(model, tmp_path / "a")
    name = next(name for name, module in model.named_modules() if isinstance(module, PackedLinear))
    with edited(tmp_path / "a") as tensors:
        kept = tensors.pop(f"{name}.weight_scale")
    with pytest.raises(CheckpointError, match=f"{name}.weight_scale"):
        load(tmp_path / "a")
    with edited(tmp_path / "a") as tensors:
        tensors[f"{name}.weight_scale"] = kept[:, :1].repeat(1, 7)
    with pytest.raises(CheckpointError, match=f"{name}.weight_scale"):
        load(tmp_path / "a")
    config = config_of(tmp_path / "a")
    config["quantization_config"]["inner"]["format"] = "int-quantized"
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="more than packed integer weights"):
        load(tmp_path / "a")
    config["quantization_config"]["inner"] = {"config_groups": 3}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="none of compressed-tensors"):
        load(tmp_path / "a")


def test_plain_transformers_refuses_it(tmp_path):
    model = attach(packed("llama"))
    model.save_pretrained(tmp_path)
    config = config_of(tmp_path)
    assert any("pip install spectrim" in name for name in config["fusion_config"])
    empty = [name for name, tensor in load_file(tmp_path / "model.safetensors").items() if tensor.numel() == 0]
    assert len(empty) == sum(
        PACKED_FORMS[n % len(PACKED_FORMS)] != "plain" for n in range(len(anatomy(FAMILIES["llama"]()).linears))
    )


def test_the_inner_config_says_what_it_was_made_from():
    grids = {"a": Grid(4, 32), "b.A": Grid(3, None, symmetric=False), "b.B": Grid(4, 32), "c": Grid(8, 128)}
    config = json.loads(json.dumps(inner_config(grids)))
    assert inner_grids(config) == grids
    assert config["format"] == "pack-quantized"
    assert len(config["config_groups"]) == 3


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("kv_cache_scheme", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("sparsity_config", {"format": "sparse-24-bitmask"}),
        ("transform_config", {"config_groups": {"u": {"type": "hadamard", "apply": []}}}),
        ("ignore", ["a"]),
        ("dynamic", True),
        ("actorder", "weight"),
    ],
)
def test_an_inner_config_that_asks_for_more_is_an_error(entry, value):
    config = json.loads(json.dumps(inner_config({"a": Grid(4, 32)})))
    owner = config["config_groups"]["group_0"]["weights"] if entry in ("dynamic", "actorder") else config
    owner[entry] = value
    with pytest.raises(CheckpointError, match="more than packed integer weights"):
        inner_grids(config)


def test_an_inner_config_is_an_object():
    with pytest.raises(CheckpointError, match="inner config that is no object"):
        SpectrimConfig({}, inner=[1])


@pytest.mark.parametrize("rotated", ["a", {"a": 1}, [1], [None]])
def test_rotations_are_a_list_of_names(rotated):
    with pytest.raises(CheckpointError, match="rotations that are no list of names"):
        SpectrimConfig({}, inner=inner_config({"a": Grid(4, 32)}), rotated=rotated)


def test_rotations_of_what_is_no_integer_are_an_error(tmp_path):
    model, name = FAMILIES["llama"](), "model.layers.0.mlp.up_proj"
    pack_nearest(model, {name: Grid(4, 32, rotated=True)})
    directory = save(model, tmp_path / "a")
    config = config_of(directory)
    assert config["quantization_config"]["rotated"] == [name]
    config["quantization_config"]["rotated"] = [name, "model.layers.1.mlp.up_proj"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"rotates inputs of model\.layers\.1\.mlp\.up_proj, which are no integers"
    ):
        load(directory)


def test_configs_without_rotations_are_as_they_were():
    config = SpectrimConfig.of({"a": ("integers", Grid(4, 32).spec)})
    assert "rotated" not in config.to_dict()
    assert config.layers() == {"a": ("integers", {"bits": 4, "group": 32, "symmetric": True})}


def test_zero_points_of_a_symmetric_grid_are_an_error(tmp_path):
    model, name = FAMILIES["llama"](), "model.layers.0.mlp.up_proj"
    pack_nearest(model, {name: Grid(4, 32, symmetric=False)})
    directory = save(model, tmp_path / "a")
    config = config_of(directory)
    config["quantization_config"]["inner"]["config_groups"]["group_0"]["weights"]["symmetric"] = True
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{name}\.weight_zero_point, of which its config says nothing"):
        load(directory)
