"""A dense model that is larger than its memory: blocks stay in the files, and every stage gives the same."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from helpers.calibrated import assert_same_bits, tensors
from helpers.samples import word_tokenizer
from spectrim.away import Away, is_away, values
from spectrim.calibrate import calibrate
from spectrim.checkpoint import load, save
from spectrim.errors import ModelError
from spectrim.experts import fuse, unfuse
from spectrim.pipeline import compress
from spectrim.storage import stored_layers

MIXTURES = (
    "mixtral", "qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4v_moe",
    "llama4", "gemma4_moe", "gpt_oss",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    families.FAMILIES["llama"]().save_pretrained(path / "llama")
    families.FAMILIES["qwen2_5_vl"]().save_pretrained(path / "qwen2_5_vl")
    for family in MIXTURES:
        {**families.FAMILIES, **families.FURTHER}[family]().save_pretrained(path / family)
    return path


def assert_same_values(whole, away):
    for name, parameter in whole.named_parameters():
        module, _, last = name.rpartition(".")
        assert torch.equal(values(away.get_submodule(module), last), parameter)


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", *MIXTURES])
def test_blocks_stay_in_the_files(family, source):
    whole, away = load(source / family), load(source / family, memory="100kB")
    unfuse(whole)
    assert not is_away(whole)
    assert is_away(away)
    assert [name for name, _ in whole.named_parameters()] == [name for name, _ in away.named_parameters()]
    assert_same_values(whole, away)
    inside = [name for name, parameter in away.named_parameters() if parameter.is_meta]
    assert all(".layers." in name or ".blocks." in name for name in inside)
    assert (family in MIXTURES) == any(".experts." in name for name in inside)
    inputs = families.example_inputs(whole)
    with torch.no_grad():
        one, other = away(**inputs).logits, whole(**inputs).logits
    if family.startswith("deepseek"):  # whose matrices on the mapped file's addresses sum in another order
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(one, other)
    assert inside == [name for name, parameter in away.named_parameters() if parameter.is_meta]
    assert "quantization_config" not in away.config.to_dict()
    assert not getattr(away, "is_quantized", False)
    assert not is_away(load(source / family, memory="1GB"))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_weights_count_in_the_dtype_that_they_are_loaded_in(stored, tmp_path):
    """Three quarters of the float32 model may be held: it fits in bfloat16 alone, whatever its files are in."""
    model = families.FAMILIES["llama"]()
    memory = f"{int(1.5 * sum(x.nbytes for x in model.parameters()))}B"
    model.to(getattr(torch, stored)).save_pretrained(tmp_path)
    for dtype, large in ((None, stored == "float32"), ("float32", True), (torch.float32, True), ("bfloat16", False)):
        assert is_away(load(tmp_path, memory=memory, dtype=dtype)) == large
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert is_away(load(tmp_path, memory=memory))  # which transformers loads it in


def test_one_expert_is_read_and_not_all(source, monkeypatch):
    """Of a tensor that holds all experts of a layer."""
    away, read = load(source / "qwen3_vl_moe", memory="100kB"), []
    row = Away.row
    monkeypatch.setattr(Away, "row", lambda self, name, number: read.append((name, number)) or row(self, name, number))
    experts = away.model.language_model.layers[0].mlp.experts
    with torch.no_grad():
        experts(torch.ones(1, 64), torch.tensor([[1, 3]]), torch.ones(1, 2))
    assert set(read) == {(name, number) for name in ("gate_up_proj", "down_proj") for number in (1, 3)}


def test_tensors_of_experts_that_a_file_holds_transposed(source, tmp_path):
    """As the hub has them [experts, in, out]; transformers would transpose them, and so does reading one expert."""
    shutil.copytree(source / "qwen3_vl_moe", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".experts." in name]:
        shape = (4, 64, 48) if name.endswith("gate_up_proj") else (4, 24, 64)
        X = tensors[name]
        tensors[name] = X if X.shape == shape else X.mT.contiguous()
    save_file(tensors, file, {"format": "pt"})
    whole, away = load(tmp_path / "model"), load(tmp_path / "model", memory="100kB")
    unfuse(whole)
    assert_same_values(whole, away)


@pytest.mark.parametrize(
    ("family", "recipe", "bits"),
    [
        ("llama", "curvature", None), ("llama", "spectrim", None), ("llama", "curvature", "auto"),
        ("mixtral", "spectrim", None), ("mixtral", "curvature", "auto"), ("gpt_oss", "curvature", None),
    ],
)  # fmt: skip
def test_calibration_and_compression_give_the_same(family, recipe, bits, source, words, tmp_path):
    options = {"text": words, "samples": 3, "seqlen": 8, "batch_size": 2}
    whole, away = load(source / family), load(source / family, memory="100kB")
    found = calibrate(whole, tmp_path / "whole", processor=word_tokenizer(), **options)
    calibrate(away, tmp_path / "away", processor=word_tokenizer(), **options)
    assert_same_bits(tmp_path / "whole", tmp_path / "away")
    assert tensors(tmp_path / "away")
    assert is_away(away)
    given = {"recipe": recipe, "retain": 0.3 if bits else 0.5, "stats": found, "processor": word_tokenizer()}
    small = [compress(model, **given, changes={"quantize.bits": bits}) for model in (whole, away)]
    layers = {name: layer.state_dict() for name, layer in stored_layers(small[1]).items()}
    assert len(layers) > 10
    assert all(tensor.is_meta for layer in layers.values() for tensor in layer.values())
    assert any("weight_packed" in layer for layer in layers.values()) == (bits is not None)
    save(small[0], tmp_path / "whole-small")
    with pytest.warns(UserWarning, match="offloaded modules"):
        save(small[1], tmp_path / "small", max_shard_size="60KB")
    assert len([*(tmp_path / "small").glob("*.safetensors")]) > 1
    files = [[load_file(file) for file in (tmp_path / name).glob("*.safetensors")] for name in ("whole-small", "small")]
    one, other = ({name: x for file in several for name, x in file.items()} for several in files)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    ids = torch.tensor([[3, 9, 27, 81]])
    with torch.no_grad():
        one, *others = (model(input_ids=ids).logits for model in (*small, load(tmp_path / "small")))
    for other in others:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_files_that_have_to_be_converted_are_refused(source, tmp_path):
    """No tiny model is stored so: experts in one tensor for each role, which transformers would join."""
    shutil.copytree(source / "qwen2_5_vl", tmp_path / "model")
    away = load(tmp_path / "model", memory="100kB")
    assert is_away(away)
    fails = ValueError("Please provide an `offload_folder` for them in `from_pretrained`.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(away), "from_pretrained", classmethod(lambda *args, **kwargs: (_ for _ in ()).throw(fails)))
        with pytest.raises(ModelError, match="is not read block by block, and it is larger than half of 100kB; raise"):
            load(tmp_path / "model", memory="100kB")


def test_experts_that_are_away_are_not_fused(source):
    away = load(source / "mixtral", memory="100kB")
    with pytest.raises(ModelError, match="cannot be fused; load the model into memory"):
        fuse(away)


def test_values_that_are_nowhere_are_said():
    with pytest.raises(ModelError, match="a weight of Linear has no values"):
        values(torch.nn.Linear(2, 3, device="meta"))
