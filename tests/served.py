"""Compressed models that vLLM can serve on a CPU: its attention there takes heads of 32 numbers and more."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from compressed import cut_linears, factored, pack_nearest, packed
from families import IMAGE, MOE, MROPE, PATCH, QWEN_TOKENS, TEXT, VIDEO, VISION_END, VISION_START, VOCAB, _seeded
from spectrim.anatomy import anatomy
from spectrim.maths.decompose import Rank
from spectrim.maths.rounding import Grid, quantize
from spectrim.storage import form

WIDE = {**TEXT, "hidden_size": 128, "initializer_range": 0.1}  # the usual 0.02 gives one token again and again
SPECIAL = {
    IMAGE: "<|image_pad|>",
    VIDEO: "<|video_pad|>",
    VISION_START: "<|vision_start|>",
    VISION_END: "<|vision_end|>",
}


def llama(form: str, **changes: Any) -> hf.PreTrainedModel:
    """Dense, or in one of the forms of `compressed.factored`; or ``mixed``: dense beside factored linears in merged
    ones; or ``integers``: in all ways to have some, beside linears without; or ``narrow``: with fewer units in the
    MLPs. `changes` are those of the config.
    """
    model = _seeded(hf.LlamaForCausalLM, hf.LlamaConfig(**WIDE, attention_bias=True, **changes))
    one, two = (f"model.layers.{i}" for i in range(2))
    if form == "dense":
        return model
    if form == "integers":
        return with_integers(model, f"{one}.", f"{two}.")
    if form == "narrow":
        return narrowed(model, {f"{one}.mlp": (40, None), f"{two}.mlp": (24, Grid(4, None))})
    if form != "mixed":
        return factored("llama", model, form)
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


def narrowed(model: hf.PreTrainedModel, counts: dict[str, tuple[int, Grid | None]]) -> hf.PreTrainedModel:
    """MLPs left with so many of their units, spread over all of them, as integers where there is a grid."""
    for mlp, (count, grid) in counts.items():
        for name, side in (("gate_proj", "outputs"), ("up_proj", "outputs"), ("down_proj", "inputs")):
            linear = model.get_submodule(f"{mlp}.{name}")
            W = linear.weight.detach() if side == "outputs" else linear.weight.detach().T
            units = torch.linspace(0, len(W) - 1, count).round().int()
            kept = W[units.long()] if side == "outputs" else W[units.long()].T.contiguous()
            layer = form("narrow").build(linear, {side: count} | ({} if grid is None else {"grid": grid.spec}))
            with torch.no_grad():
                layer.units.copy_(units)
                if grid is None:
                    layer.N.weight.copy_(kept)
                else:
                    layer.N.load(quantize(kept, grid, dtype=kept.dtype))
            model.set_submodule(f"{mlp}.{name}", layer)
    return model


def with_integers(model: hf.PreTrainedModel, one: str, two: str) -> hf.PreTrainedModel:
    """The two layers of `llama`, with 2, 3, 4 and 8 bits, groups and none, zero points and none."""
    ranks: dict[str, Rank] = {
        f"{one}self_attn.k_proj": (4, 7),
        f"{one}self_attn.v_proj": 11,
        f"{one}self_attn.o_proj": 32,
        f"{one}mlp.gate_proj": 32,
        f"{two}self_attn.q_proj": 20,
        f"{two}self_attn.k_proj": 9,
        f"{two}self_attn.o_proj": 32,
        f"{two}mlp.gate_proj": 30,
        f"{two}mlp.down_proj": 25,
    }
    cut_linears(model, ranks, {f"{one}self_attn.v_proj", f"{two}mlp.gate_proj"})
    eight, four = Grid(8, 32), Grid(4, 32)
    grids = {
        f"{one}self_attn.q_proj": four,
        f"{one}self_attn.k_proj.A.1": Grid(8, None),
        f"{one}self_attn.k_proj.B": Grid(4, 64),
        f"{one}self_attn.o_proj.A": four,
        f"{one}self_attn.o_proj.B": Grid(4, 128),
        f"{one}mlp.gate_proj.R": Grid(4, 32, symmetric=False),
        f"{one}mlp.gate_proj.A": eight,
        f"{one}mlp.gate_proj.B": eight,
        f"{one}mlp.down_proj": Grid(3, None, symmetric=False),
        f"{two}self_attn.q_proj.A": Grid(8, None),
        f"{two}self_attn.q_proj.B": Grid(4, 32, symmetric=False),
        f"{two}self_attn.k_proj.R": Grid(3, 64),
        f"{two}self_attn.o_proj.R": four,
        f"{two}self_attn.o_proj.A": Grid(4, None),
        f"{two}mlp.up_proj": Grid(8, 128, symmetric=False),
        f"{two}mlp.down_proj.B": Grid(2, 32),
    }
    pack_nearest(model, grids)
    return model


def mixture(family: str, form: str) -> hf.PreTrainedModel:
    """A mixture of experts: dense, in one of the forms of `compressed.factored`; or ``mixed``: the linears of every
    expert take turns in all forms, and some stay dense.
    """
    if family == "mixtral":
        model = _seeded(hf.MixtralForCausalLM, hf.MixtralConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2))
    else:
        model = _seeded(
            hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**WIDE, head_dim=32, **{**MOE, "moe_intermediate_size": 64})
        )
    if form == "dense":
        return model
    if form != "mixed":
        return factored(family, model, form)
    experts = [x.name for x in anatomy(model).linears if x.expert is not None]
    packed(family, model)
    dense = [name for name in experts if type(model.get_submodule(name)) is torch.nn.Linear]
    return cut_linears(model, dict.fromkeys(dense[::2], 20), dense[::2])


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
