"""A dense model that is larger than its memory: blocks stay in the files, and every stage gives the same."""

import pytest
import torch
from safetensors.torch import load_file

import families
from helpers.calibrated import assert_same_bits, tensors
from helpers.samples import word_tokenizer
from spectrim.away import is_away, values
from spectrim.calibrate import calibrate
from spectrim.checkpoint import load, save
from spectrim.errors import ModelError
from spectrim.pipeline import compress
from spectrim.storage import stored_layers


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    families.FAMILIES["llama"]().save_pretrained(path / "llama")
    families.FAMILIES["qwen2_5_vl"]().save_pretrained(path / "qwen2_5_vl")
    families.FAMILIES["mixtral"]().save_pretrained(path / "mixtral")
    return path


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_blocks_stay_in_the_files(family, source):
    whole, away = load(source / family), load(source / family, memory="100kB")
    assert not is_away(whole)
    assert is_away(away)
    for name, parameter in whole.named_parameters():
        module, _, last = name.rpartition(".")
        assert torch.equal(values(away.get_submodule(module), last), parameter)
    inside = [name for name, parameter in away.named_parameters() if parameter.is_meta]
    assert all(".layers." in name or ".blocks." in name for name in inside)
    inputs = families.example_inputs(whole)
    with torch.no_grad():
        assert torch.equal(away(**inputs).logits, whole(**inputs).logits)
    assert inside == [name for name, parameter in away.named_parameters() if parameter.is_meta]
    assert not is_away(load(source / family, memory="1GB"))


@pytest.mark.parametrize(("recipe", "bits"), [("curvature", None), ("spectrim", None), ("curvature", "auto")])
def test_calibration_and_compression_give_the_same(recipe, bits, source, words, tmp_path):
    options = {"text": words, "samples": 3, "seqlen": 8, "batch_size": 2}
    whole, away = load(source / "llama"), load(source / "llama", memory="100kB")
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


def test_a_model_with_experts_is_refused(source):
    with pytest.raises(ModelError, match="with experts is not read block by block and is larger than half of 100kB"):
        load(source / "mixtral", memory="100kB")


def test_values_that_are_nowhere_are_said():
    with pytest.raises(ModelError, match="a weight of Linear has no values"):
        values(torch.nn.Linear(2, 3, device="meta"))
