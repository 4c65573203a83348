"""Latent caches give what ordinary ones do, with every family and every way to generate."""

import copy
import threading
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

from compressed import cut_linears, factored
from families import FAMILIES, FURTHER, TEXT, example_inputs, text_inputs
from spectrim.anatomy import anatomy
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.demo.tasks import questions
from spectrim.errors import ModelError
from spectrim.latent import LatentCache, attention, cache
from spectrim.latent.cache import LatentLayer, quantized
from spectrim.samples.batches import image_prompt, model_tensors

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of the name past_key_values

NO_HEADS = {"phi3"}  # q, k and v are one linear
NOT_ROTATED = {"opt"}
KINDS = [*sorted(FAMILIES.keys() - NO_HEADS - NOT_ROTATED), "qwen3_5", "gemma2", "granite"]
CLOSE = 1e-5  # of the largest logit, float32


def model_of(family: str) -> Any:
    return factored(family, None if family in FAMILIES else FURTHER[family](), form="headwise")


def windowed(family: str) -> Any:
    """Layers whose windows of 6 tokens are soon passed."""
    sizes = {**TEXT, "head_dim": 16, "sliding_window": 6}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    torch.manual_seed(0)
    made = {
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**sizes)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes, **layers)),
        "gemma3_text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes, **layers)),
    }[family]()
    return factored(family, made.eval(), form="headwise")


def generated(model: Any, inputs: Any, past: Any, new: int = 20, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the logits or scores of the new ones."""
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad():
        found = model.generate(**inputs, past_key_values=past, output_logits=True, **{**options, **how})
    return found.sequences, torch.stack(found.logits)


def ordinary(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def assert_same(model: Any, inputs: Any, close: float = CLOSE, **how: Any) -> LatentCache:
    past = LatentCache(model)
    expected, found = generated(model, inputs, ordinary(model), **how), generated(model, inputs, past, **how)
    assert torch.equal(expected[0], found[0])
    assert (expected[1] - found[1]).abs().max() <= close * expected[1].abs().max()
    return past


def padded(model: Any, batch: int = 3) -> dict[str, torch.Tensor]:
    """Texts of 12, 9, 6, … tokens, filled up on the left."""
    inputs = text_inputs(model, batch=batch)
    for row in range(1, batch):
        inputs["attention_mask"][row, : 3 * row % 11] = 0
    return inputs


@pytest.mark.parametrize("family", KINDS)
def test_fifty_steps_after_an_image_or_a_text_give_the_same_logits(family):
    model = model_of(family)
    past = assert_same(model, example_inputs(model, batch=2), new=50)
    latent = [layer for layer in past.layers if isinstance(layer, LatentLayer)]
    assert len(latent) == len(list(attention.sites(model))) > 0


def reordered(past, *tensors):
    order = torch.tensor([2, 0, 1])
    past.reorder_cache(order)
    return [x[order] for x in tensors]


def selected(past, *tensors):
    kept = torch.tensor([2, 1])
    past.batch_select_indices(kept)
    return [x[kept] for x in tensors]


def repeated(past, *tensors):
    past.batch_repeat_interleave(2)
    return [x.repeat_interleave(2, 0) for x in tensors]


@pytest.mark.parametrize("change", [reordered, selected, repeated])
def test_sequences_change_places_with_their_positions(change):
    """Of texts with different padding, as no beam search does it."""
    model = model_of("qwen3")
    inputs, found = padded(model), []
    for past in (ordinary(model), LatentCache(model)):
        with torch.no_grad():
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            model(**inputs, position_ids=positions, past_key_values=past)
            mask, last, places = change(
                past, inputs["attention_mask"], inputs["input_ids"][:, -1:], positions[:, -1:] + 1
            )
            mask = torch.cat([mask, torch.ones_like(last)], dim=1)
            step = {"input_ids": last, "attention_mask": mask, "position_ids": places}
            found.append(model(**step, past_key_values=past).logits)
    assert (found[0] - found[1]).abs().max() <= CLOSE * found[0].abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3"])
def test_a_batch_padded_on_the_left(family):
    model = model_of(family)
    inputs = example_inputs(model, batch=3)
    pads = torch.tensor([0, 1, 2])
    inputs["attention_mask"] = (torch.arange(inputs["input_ids"].shape[1]) >= pads[:, None]).long()
    assert_same(model, inputs)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "llava"])
def test_beams_are_reordered(family, how):
    model = model_of(family)
    assert_same(model, example_inputs(model, batch=2), **how)


def test_beams_of_padded_texts_have_positions_of_their_own():
    model = model_of("llama")
    assert_same(model, padded(model), num_beams=3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_prefill_in_chunks(family):
    model = model_of(family)
    assert_same(model, padded(model), prefill_chunk_size=5)


def test_a_chunk_without_a_mask_is_causal():
    model = model_of("gemma3_text")
    ids, found = text_inputs(model)["input_ids"], []
    for mask in (None, {"full_attention": None, "sliding_attention": None}):
        past = LatentCache(model)
        with torch.no_grad():
            model(input_ids=ids[:, :6], past_key_values=past)
            found.append(model(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=past).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens_of_a_wrong_guess_are_taken_back(family):
    model = model_of(family)
    inputs = text_inputs(model)
    inputs["input_ids"][0, 6:] = inputs["input_ids"][0, :6]  # something to look up
    expected = generated(model, inputs, ordinary(model))[0]
    past = LatentCache(model)
    removed = []
    crop = past.crop
    past.crop = lambda count: (removed.append(count), crop(count))
    found = generated(model, inputs, past, prompt_lookup_num_tokens=3)[0]
    assert torch.equal(expected, found)
    assert min(removed) < 0


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_windows_keep_their_last_tokens(family):
    model = windowed(family)
    past = assert_same(model, padded(model))
    for layer in past.layers:
        assert len(layer.z_k) == (5 if layer.is_sliding else 12 + 20 - 1)
    assert_same(model, padded(model), num_beams=2)
    assert_same(model, text_inputs(model, batch=2, length=40), prefill_chunk_size=7)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_windows_take_tokens_back(family):
    model = windowed(family)
    inputs = text_inputs(model)
    inputs["input_ids"][0, 6:] = inputs["input_ids"][0, :6]
    expected = generated(model, inputs, ordinary(model))[0]
    assert torch.equal(expected, generated(model, inputs, LatentCache(model), prompt_lookup_num_tokens=3)[0])


def test_a_window_that_was_passed_cannot_be_taken_back_unrecorded():
    model = windowed("mistral")
    past = LatentCache(model)
    generated(model, text_inputs(model), past)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        past.crop(-1)


def test_sixty_four_sequences():
    model = model_of("qwen2")
    assert_same(model, padded(model, 64), new=5)


def test_a_layer_that_is_not_factored_by_head_keeps_keys_and_values():
    model = FAMILIES["llama"]()
    parts = {x.name: (4, 3) for x in anatomy(model).linears if x.role in "kv" and ".0." in x.name}
    cut_linears(model, parts, ())
    past = assert_same(model, padded(model))
    assert [type(layer).__name__ for layer in past.layers] == ["LatentLayer", "DynamicLayer"]


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_keys_or_values_in_another_form_are_kept_whole(family, role):
    model = FAMILIES[family]()
    parts = {x.name: (4, 3) for x in anatomy(model).linears if x.role == role}
    cut_linears(model, parts, ())
    past = assert_same(model, padded(model))
    kept, whole = (past.layers[0].z_k, past.layers[0].z_v) if role == "k" else (past.layers[0].z_v, past.layers[0].z_k)
    width = model.config.num_key_value_heads * model.model.layers[0].self_attn.head_dim
    assert (kept.held.shape[2], whole.held.shape[2]) == (7, width)
    past = LatentCache(model, "int8")
    near = generated(model, text_inputs(model), past)[1], generated(model, text_inputs(model), ordinary(model))[1]
    assert (near[0][:2] - near[1][:2]).abs().max() < 0.05 * near[1].abs().max()


def test_bytes_are_those_of_the_ranks():
    model, tokens, batch = model_of("qwen3"), 12 + 9, 2
    past = LatentCache(model)
    generated(model, text_inputs(model, batch=batch), past, new=10)
    numbers = heads = 0
    for layer in (x for x in anatomy(FAMILIES["qwen3"]()).linears if x.role in "kv"):
        numbers += sum(model.get_submodule(layer.name).rank)
        heads += layer.heads if layer.role == "k" else 0  # an inverse root mean square of each key
    turns = model.config.head_dim  # of half as many complex numbers, for all layers
    positions = len(past.tables[0].rows["turns"].held)
    assert past.nbytes == tokens * 4 * (batch * (numbers + heads) + positions * turns)
    assert len(past.tables) == 1


def test_tables_are_kept_once_for_each_kind_of_rotation():
    model = windowed("gemma3_text")
    past = LatentCache(model)
    generated(model, text_inputs(model), past)
    assert len(past.tables) == 2  # of windows and of whole layers


@pytest.mark.parametrize("family", ["llama", "qwen3_vl", "gemma2"])
def test_integers_give_what_latents_rounded_to_them_do(family, monkeypatch):
    original = attention._take

    def rounded(module, args, output):
        for site in attention.sites(model):
            for layer, ranks in zip((site.k, site.v), site.ranks, strict=True):
                if layer.B is module:
                    codes, scale = quantized(output, ranks)
                    wide = scale.repeat_interleave(torch.tensor(ranks), dim=2)
                    original(module, args, codes * wide)

    model = model_of(family)
    inputs = example_inputs(model, batch=2)
    past = LatentCache(model, "int8")
    found = generated(model, inputs, past)
    exact = generated(model, inputs, ordinary(model))
    model = copy.deepcopy(model_of(family))
    monkeypatch.setattr(attention, "_take", rounded)
    monkeypatch.setattr(cache, "PROBED", 0)
    expected = generated(model, inputs, LatentCache(model))
    assert torch.equal(expected[0], found[0])
    assert (expected[1] - found[1]).abs().max() <= CLOSE * expected[1].abs().max()
    assert (exact[1][1:] - found[1][1:]).abs().max() > 100 * CLOSE * exact[1].abs().max()  # rounding shows
    assert past.layers[0].z_k.held.dtype == torch.int8


def test_integers_lose_no_more_than_half_a_step():
    torch.manual_seed(0)
    z, ranks = torch.randn(2, 5, 7), (4, 3)
    z[0, 0, :4] = 0
    codes, scale = quantized(z, ranks)
    wide = scale.repeat_interleave(torch.tensor(ranks), dim=2)
    assert ((codes * wide - z).abs() <= wide / 2 + 1e-6).all()
    assert (codes.split(ranks, 2)[1].abs().amax(2) == 127).all()
    assert torch.equal(codes[0, 0, :4], torch.zeros(4, dtype=torch.int8))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_without_a_latent_cache_is_as_before(family):
    model = model_of(family)
    inputs = padded(model)
    with torch.no_grad():
        before = model(**inputs).logits, generated(model, inputs, ordinary(model))[1]
        LatentCache(model)
        after = model(**inputs).logits, generated(model, inputs, ordinary(model))[1]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert "latent" not in str(model.config.to_dict())


def test_a_prompt_is_read_once_and_continued_twice():
    model = model_of("qwen3")
    inputs = text_inputs(model)
    start = {name: x[:, :8] for name, x in inputs.items()}
    past = LatentCache(model)
    with torch.no_grad():
        model(**start, past_key_values=past)
    expected = generated(model, inputs, ordinary(model))[0]
    for _ in range(2):
        assert torch.equal(generated(model, inputs, copy.deepcopy(past))[0], expected)
    assert past.get_seq_length() == 8


def test_a_cache_is_used_again_after_a_reset():
    model = model_of("llama")
    past = assert_same(model, padded(model))
    past.reset()
    assert past.nbytes == past.get_seq_length() == 0
    inputs = text_inputs(model, batch=2)
    assert torch.equal(generated(model, inputs, past)[0], generated(model, inputs, ordinary(model))[0])


def test_two_threads_generate_with_one_model():
    model = model_of("llama")
    inputs = [text_inputs(model, seed=seed, length=6 + seed) for seed in range(2)]
    expected = [generated(model, x, ordinary(model))[0] for x in inputs]
    LatentCache(model)
    found: dict[int, list[bool]] = {0: [], 1: []}

    def work(number: int) -> None:
        for _ in range(4):
            tokens = generated(model, inputs[number], LatentCache(model))[0]
            found[number].append(torch.equal(tokens, expected[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [True] * 4, 1: [True] * 4}


@pytest.fixture(scope="module")
def demo() -> Any:
    """The built-in model with keys and values in factors of half the rank, and an image prompt."""
    directory = resolve("demo")
    model: Any = load(directory, dtype=torch.float32)
    linears = [x for x in anatomy(model).linears if x.role in "kv" and x.place == "backbone"]
    cut_linears(model, {x.name: tuple(32 + 4 * h for h in range(x.heads)) for x in linears}, ())
    processor = load_processor(directory)
    asked = questions("colour", "test", 1)[0]
    prompt = image_prompt(processor, asked.question)
    return model, model_tensors(processor, [prompt], [[asked.image]], [asked.question])


def test_the_built_in_model_gives_the_same_logits_after_an_image(demo):
    model, inputs = demo
    assert_same(model, inputs, new=50)


def test_the_built_in_model_gives_the_same_tokens_in_bfloat16(demo):
    model, inputs = copy.deepcopy(demo)
    model = model.bfloat16()
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    expected, found = (generated(model, inputs, past, new=50) for past in (ordinary(model), LatentCache(model)))
    differ = (expected[0] != found[0]).nonzero()
    if len(differ):  # a tie: the first other token has a logit within the rounding of bfloat16
        at = int(differ[0, 1])
        logits = expected[1][at - inputs["input_ids"].shape[1], 0]
        chosen, other = (tokens[0, at] for tokens in (expected[0], found[0]))  # the end token is not allowed
        assert logits[chosen] - logits[other] <= 2**-7 * logits.abs().max()


def refused(model: Any, words: str, inputs: Any = None, latent_dtype: str | None = None, **how: Any) -> None:
    with pytest.raises(ModelError, match=words):
        generated(model, inputs or text_inputs(model), LatentCache(model, latent_dtype), **how)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("opt", "OPTForCausalLM has no layer of rotated keys"),
        ("glm4v", "Glm4vTextAttention changes its keys"),
        ("olmo2", "Olmo2Attention normalises its keys by Olmo2RMSNorm"),
        ("gpt_oss", "GptOssAttention changes its keys"),
    ],
)
def test_families_are_refused_by_name(family, words):
    model = model_of(family)
    refused(model, words, example_inputs(model))


def test_a_model_without_factors_by_head_is_refused():
    refused(factored("llama"), "compress it with the recipe laser")
    refused(FAMILIES["llama"](), "compress it with the recipe laser")


def test_options_are_refused_by_name():
    model = model_of("llama")
    refused(model, "dtype 'int3'", latent_dtype="int3")
    other = copy.deepcopy(model)
    with pytest.raises(ModelError, match="by the attention of its own model"):
        generated(other, text_inputs(other), LatentCache(model))
    LatentCache(other)
    with pytest.raises(ModelError, match="made for another model"):
        generated(other, text_inputs(other), LatentCache(model))
    model.config._attn_implementation = "flex_attention"
    refused(model, "not with flex_attention")


def test_what_attention_is_given_besides_is_refused_by_name():
    model = model_of("llama")
    with pytest.raises(ModelError, match="LlamaAttention attends with s_aux"):
        model(**text_inputs(model), past_key_values=LatentCache(model), s_aux=torch.zeros(4))


def test_dropout_and_attention_weights_are_refused():
    model = model_of("gemma2")  # eager
    refused(model, "returns no weights", output_attentions=True)
    model.config.attention_dropout = 0.1
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    model.train()
    refused(model, "no dropout")


def test_an_adapter_is_refused_and_other_changes_of_keys_are_noticed():
    model = model_of("llama")
    site = next(attention.sites(model))
    site.module.v_proj.register_forward_hook(lambda _module, _args, output: output * 1.01)
    refused(model, "changes its values")
    model = model_of("llama")
    site = next(attention.sites(model))
    site.k.A[0] = torch.nn.Sequential(site.k.A[0])
    refused(model, "merge its adapter first")


def test_attention_that_does_not_ask_the_interface_is_refused(monkeypatch):
    model = model_of("llama")
    monkeypatch.setattr(
        hf.models.llama.modeling_llama.ALL_ATTENTION_FUNCTIONS,
        "get_interface",
        lambda _name, default: default,
        raising=False,
    )
    refused(model, "does not call the attention function")
