"""Compressed models that vLLM can serve on a CPU: its attention there takes heads of 32 numbers and more."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from compressed import cut_linears, factored
from families import IMAGE, MROPE, PATCH, QWEN_TOKENS, TEXT, VIDEO, VISION_END, VISION_START, VOCAB, _seeded
from spectrim.layers import Rank

WIDE = {**TEXT, "hidden_size": 128, "initializer_range": 0.1}  # the usual 0.02 gives one token again and again
SPECIAL = {
    IMAGE: "<|image_pad|>",
    VIDEO: "<|video_pad|>",
    VISION_START: "<|vision_start|>",
    VISION_END: "<|vision_end|>",
}


def llama(form: str) -> hf.PreTrainedModel:
    """In one of the forms of `compressed.factored`, or ``mixed``: dense beside factored linears in merged ones."""
    model = _seeded(hf.LlamaForCausalLM, hf.LlamaConfig(**WIDE, attention_bias=True))
    if form != "mixed":
        return factored("llama", model, form)
    one, two = (f"model.layers.{i}" for i in range(2))
    ranks: dict[str, Rank] = {
        f"{one}.self_attn.q_proj": (3, 9, 1, 5),
        f"{one}.self_attn.k_proj": 20,
        f"{one}.mlp.gate_proj": 30,
        f"{one}.mlp.down_proj": 25,
        f"{two}.self_attn.k_proj": (4, 7),
        f"{two}.self_attn.v_proj": 11,
        f"{two}.self_attn.o_proj": 17,
        f"{two}.mlp.up_proj": 40,
    }
    return cut_linears(model, ranks, {f"{one}.mlp.gate_proj", f"{one}.mlp.down_proj", f"{two}.self_attn.v_proj"})


def qwen2_5_vl(form: str) -> tuple[hf.PreTrainedModel, Any]:
    """The model, all its linears factored, and a processor for images of some tens of pixels."""
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "patch_size": PATCH,
        "window_size": 16,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    }
    rope = {**MROPE, "mrope_section": [4, 6, 6]}
    config = hf.Qwen2_5_VLConfig(text_config={**WIDE, "rope_parameters": rope}, vision_config=vision, **QWEN_TOKENS)
    model = factored("qwen2_5_vl", _seeded(hf.Qwen2_5_VLForConditionalGeneration, config), form)
    words = {SPECIAL.get(i, f"w{i}"): i for i in range(VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL.values()])
    size = {"patch_size": PATCH, "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}}
    processor = hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**size),
        tokenizer=hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2"),
        video_processor=hf.Qwen2VLVideoProcessor(**size),
    )
    return model, processor


def picture(path: Path) -> Image.Image:
    """A small picture of random colours, written to `path` as PNG."""
    pixels = torch.randint(0, 256, (16, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    image.save(path)
    return image


@torch.no_grad()
def greedy(model: hf.PreTrainedModel, tokens: int, **inputs: Any) -> list[int]:
    """The next `tokens` token ids by transformers, end tokens like any other."""
    ids = inputs["input_ids"]
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()
