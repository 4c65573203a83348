"""The flag of `load` and the field of the config that make every `generate` use a latent cache."""

import copy
import json
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

import spectrim
from compressed import factored
from families import FAMILIES, text_inputs
from spectrim.checkpoint import save
from spectrim.checkpoint.config import SpectrimConfig
from spectrim.errors import CheckpointError, ModelError
from spectrim.latent import LatentCache

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Any:
    home = tmp_path_factory.mktemp("heads") / "model"
    save(factored("qwen2_5_vl", form="headwise"), home)
    return home


def generated(model: Any, **how: Any) -> Any:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(**text_inputs(model), **{**options, **how})
    return found.sequences, getattr(found, "cache", None) or found.past_key_values


def test_every_generate_uses_latents(directory):
    expected, plain = generated(spectrim.load(directory))
    model = spectrim.load(directory, latent_cache=True)
    for how in ({}, {"num_beams": 2}):
        past = generated(model, **how)[1]
        assert type(past) is LatentCache
    assert torch.equal(generated(model)[0], expected)
    assert type(plain) is DynamicCache
    assert generated(spectrim.load(directory, latent_cache="int8"))[1].layers[0].z_k.held.dtype == torch.int8


def test_a_cache_of_ones_own_and_none_are_as_before(directory):
    model = spectrim.load(directory, latent_cache=True)
    own = DynamicCache(config=model.config.get_text_config())
    assert generated(model, past_key_values=own)[1] is own
    assert torch.equal(generated(model)[0], model.generate(**text_inputs(model), max_new_tokens=6, use_cache=False))


def test_copies_have_caches_of_their_own(directory):
    model = spectrim.load(directory, latent_cache=True)
    other = copy.deepcopy(model)
    past = generated(other)[1]
    assert past.layers[0].site.module in set(other.modules())
    assert past.layers[0].site.module not in set(model.modules())


def test_the_config_can_ask_for_it_and_the_argument_overrules(directory, tmp_path):
    home = tmp_path / "asks"
    save(factored("qwen2_5_vl", form="headwise"), home)
    config = json.loads((home / "config.json").read_text())
    assert "latent_cache" not in config["quantization_config"]
    config["quantization_config"]["latent_cache"] = "int8"
    (home / "config.json").write_text(json.dumps(config))
    model = hf.AutoModelForImageTextToText.from_pretrained(home)
    assert generated(model)[1].layers[0].latent_dtype == "int8"
    assert type(generated(spectrim.load(home, latent_cache=False))[1]) is DynamicCache
    assert generated(spectrim.load(home, latent_cache=True))[1].layers[0].latent_dtype is None


def test_the_config_keeps_what_it_was_given():
    assert SpectrimConfig({"a": 2}, latent_cache="int8").to_dict()["latent_cache"] == "int8"
    assert SpectrimConfig({"a": 2}, latent_cache="int8-folded").to_dict()["latent_cache"] == "int8-folded"
    assert "latent_cache" not in SpectrimConfig({"a": 2}).to_dict()
    with pytest.raises(CheckpointError, match="no latent_cache 'int3'; choose true, false, 'int8', 'folded'"):
        SpectrimConfig({"a": 2}, latent_cache="int3")
    with pytest.raises(CheckpointError, match="no latent_cache 1"):
        SpectrimConfig({"a": 2}, latent_cache=1)


def test_what_cannot_be_is_refused(directory, tmp_path):
    with pytest.raises(CheckpointError, match="no latent_cache 'yes'"):
        spectrim.load(directory, latent_cache="yes")
    save(FAMILIES["llama"](), tmp_path / "dense")
    with pytest.raises(ModelError, match="compress it with the recipe laser"):
        spectrim.load(tmp_path / "dense", latent_cache=True)
    model = spectrim.load(directory, latent_cache=True)
    with pytest.raises(ModelError, match="no cache of the kind 'static'"):
        generated(model, cache_implementation="static")
    with pytest.raises(ModelError, match="no cache of the kind 'offloaded'"):
        generated(model, cache_implementation="offloaded")


def test_an_assistant_that_keeps_latents_takes_tokens_back(directory):
    model, helper = spectrim.load(directory), spectrim.load(directory, latent_cache=True)
    text = text_inputs(model)
    expected = model.generate(**text, max_new_tokens=8, do_sample=False)
    assert torch.equal(expected, model.generate(**text, max_new_tokens=8, do_sample=False, assistant_model=helper))
