"""A_v inside the output projection gives what it gives outside."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import spectrim
from compressed import cut_linears, factored, pack_nearest
from families import FAMILIES, FURTHER, example_inputs, text_inputs
from spectrim.anatomy import anatomy
from spectrim.checkpoint import save
from spectrim.errors import ModelError
from spectrim.latent import LatentCache, attention, folding, use_latent_cache, use_ordinary_cache
from spectrim.maths.rounding import Grid

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of the name past_key_values


def values_by_head(family: str) -> Any:
    """A model with dense output projections: keys and values alone are factored, with ranks that differ by head."""
    model = FAMILIES[family]()
    linears = [x for x in anatomy(model).linears if x.role in "kv" and x.place == "backbone"]
    return cut_linears(model, {x.name: tuple(4 + 2 * h for h in range(x.heads)) for x in linears}, ())


def generated(model: Any, inputs: Any, past: Any, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        found = model.generate(**inputs, past_key_values=past, **{**options, **how})
    return found.sequences, torch.stack(found.logits)


def ordinary(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def assert_same(model: Any, inputs: Any, **how: Any) -> LatentCache:
    past = LatentCache(model, folded=True)
    expected, found = generated(model, inputs, ordinary(model), **how), generated(model, inputs, past, **how)
    assert torch.equal(expected[0], found[0])
    assert (expected[1] - found[1]).abs().max() <= 1e-5 * expected[1].abs().max()
    return past


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "qwen3", "gemma3_text", "llava"])
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_the_same_logits_through_a_dense_projection_and_through_a_factor(family, form):
    """Grouped queries with ranks that differ by head, biases, normalised keys, windows."""
    model = values_by_head(family) if form == "dense" else factored(family, form="headwise")
    inputs = example_inputs(model, batch=3)
    inputs["attention_mask"][1, :2] = 0
    steps: list[int] = []
    product = torch.nn.functional.linear
    past = LatentCache(model, folded=True)
    expected = generated(model, inputs, ordinary(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            folding.nn.functional, "linear", lambda x, W, b=None: steps.append(W.shape[1]) or product(x, W, b)
        )
        found = generated(model, inputs, past)
    assert torch.equal(expected[0], found[0])
    assert (expected[1] - found[1]).abs().max() <= 1e-5 * expected[1].abs().max()
    site = next(attention.sites(model))
    queries, heads = site.module.config.num_attention_heads, len(site.ranks[1])
    assert queries // heads * sum(site.ranks[1]) in steps  # the product of mean latents ran


def test_pivots_read_through_their_factor():
    model = FAMILIES["qwen2"]()
    linears = anatomy(model).linears
    ranks = {x.name: tuple(4 + h for h in range(x.heads)) for x in linears if x.role in "kv"}
    outputs = [x.name for x in linears if x.role == "o"]
    cut_linears(model, {**ranks, **dict.fromkeys(outputs, 20)}, outputs)
    assert_same(model, text_inputs(model))


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"prefill_chunk_size": 5}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_ways_to_generate(how):
    model = values_by_head("qwen2")
    inputs = text_inputs(model)
    inputs["input_ids"][0, 6:] = inputs["input_ids"][0, :6]
    if "prompt_lookup_num_tokens" in how:
        expected = generated(model, inputs, ordinary(model))[0]
        assert torch.equal(expected, generated(model, inputs, LatentCache(model, folded=True), **how)[0])
    else:
        assert_same(model, inputs, **how)


def test_integers_are_those_of_latents_that_are_not_folded():
    model = values_by_head("qwen2")
    inputs = text_inputs(model)
    found = [generated(model, inputs, LatentCache(model, "int8", folded=folded))[1] for folded in (False, True)]
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()


def test_layers_with_whole_values_are_left_alone():
    model = FAMILIES["llama"]()
    linears = [x for x in anatomy(model).linears if x.role == "k" or (x.role == "v" and ".0." in x.name)]
    cut_linears(model, {x.name: (4, 3) for x in linears}, ())
    past = assert_same(model, text_inputs(model))
    assert [layer.folded is not None for layer in past.layers] == [True, False]


def test_the_product_follows_its_weights_and_is_made_once():
    model = values_by_head("qwen2")
    inputs, o = text_inputs(model), model.model.layers[0].self_attn.o_proj
    assert_same(model, inputs)
    made = o._folded
    assert_same(model, inputs)
    assert o._folded is made
    with torch.no_grad():
        o.weight.mul_(1.5)
        model.model.layers[1].self_attn.v_proj.A[0].weight.neg_()
    assert_same(model, inputs)
    assert_same(copy.deepcopy(model), inputs)
    assert_same(model.double(), inputs)


def test_tensors_of_a_model_stay_what_they_are(tmp_path):
    model = values_by_head("qwen2_5_vl")
    inputs = text_inputs(model)
    save(model, tmp_path / "model")
    loaded = spectrim.load(tmp_path / "model", latent_cache="folded")
    before = {name: tensor.clone() for name, tensor in spectrim.load(tmp_path / "model").state_dict().items()}
    assert type(generated(loaded, inputs, None)[0]) is torch.Tensor
    assert {*before} == {*loaded.state_dict()}
    loaded.save_pretrained(tmp_path / "again")
    again = spectrim.load(tmp_path / "again", latent_cache="int8-folded").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    expected = loaded(**inputs).logits
    dense = loaded.dequantize()
    assert (dense(**inputs).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    tokens = dense.generate(**inputs, max_new_tokens=4, do_sample=False)  # with the ordinary cache
    assert torch.equal(tokens, generated(model, inputs, ordinary(model))[0][:, : tokens.shape[1]])
    assert not any("_folded" in vars(module) or "forward" in vars(module) for module in dense.modules())


def test_ordinary_caches_and_training_read_the_weight_as_it_is():
    model = values_by_head("llama")
    inputs = text_inputs(model)
    expected = model(**inputs).logits
    use_latent_cache(model, folded=True)
    assert torch.equal(model(**inputs).logits, expected)
    model(**inputs).logits.sum().backward()
    assert model.model.layers[0].self_attn.o_proj.weight.grad is not None
    assert_same(model, inputs)
    use_ordinary_cache(model)
    assert "forward" not in vars(model.model.layers[0].self_attn.o_proj)


def test_a_gate_between_is_refused():
    model = factored("qwen3_5", FURTHER["qwen3_5"](), form="headwise")
    with pytest.raises(
        ModelError, match="Attention changes what attention gives before o_proj reads it; leave folding"
    ):
        generated(model, text_inputs(model), LatentCache(model, folded=True))


def test_projections_that_are_not_dense_are_refused_by_name():
    model = values_by_head("llama")
    pack_nearest(model, {"model.layers.1.self_attn.o_proj": Grid(8, None, True)})
    with pytest.raises(ModelError, match="o_proj of LlamaAttention, which is a PackedLinear that is not read by one"):
        LatentCache(model, folded=True)
    model = values_by_head("llama")
    model.model.layers[0].self_attn.o_proj = torch.nn.Sequential(model.model.layers[0].self_attn.o_proj)
    with pytest.raises(ModelError, match="which is a Sequential"):
        use_latent_cache(model, folded=True)
