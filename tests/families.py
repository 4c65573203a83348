"""Few-layer random models of every supported family, built from the real config classes, and inputs for them.

All are fp32, seeded, and small enough that one forward pass takes milliseconds. `text_inputs` and `example_inputs` give
keyword arguments of ``model.forward``; no processor is involved.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

VOCAB = 128
IMAGE, VIDEO, VISION_START, VISION_END = 120, 121, 122, 123  # token ids; the ids of text lie below
SIDE, PATCH = 16, 4  # pixels: 4 × 4 patches

# Every family of text backbones: 4 query heads, 2 key/value heads.
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _seeded(model_class: type[PreTrainedModel], config: hf.PreTrainedConfig) -> PreTrainedModel:
    """Build the model; parameters that start at zero (biases, gates, Gemma 3's projection) get values, so all act."""
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta and not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval()


def _llava() -> PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE
    )
    return _seeded(hf.LlavaForConditionalGeneration, config)


def _llava_next() -> PreTrainedModel:
    llama3 = hf.LlamaConfig(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=llama3,
        image_token_index=IMAGE,
        image_grid_pinpoints=pinpoints,
    )
    return _seeded(hf.LlavaNextForConditionalGeneration, config)


def _llava_onevision() -> PreTrainedModel:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
    )
    return _seeded(hf.LlavaOnevisionForConditionalGeneration, config)


def _qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": PATCH}
    config = hf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **QWEN_TOKENS)
    return _seeded(hf.Qwen2VLForConditionalGeneration, config)


def _qwen2_5_vl() -> PreTrainedModel:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH,
        "window_size": 16,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    config = hf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **QWEN_TOKENS)
    return _seeded(hf.Qwen2_5_VLForConditionalGeneration, config)


def _qwen3_vision() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }


def _qwen3_vl() -> PreTrainedModel:
    text = {**TEXT, "head_dim": 16, "rope_parameters": MROPE}
    config = hf.Qwen3VLConfig(text_config=text, vision_config=_qwen3_vision(), **QWEN_TOKENS)
    return _seeded(hf.Qwen3VLForConditionalGeneration, config)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _qwen3_vl_moe() -> PreTrainedModel:
    text = {**TEXT, "head_dim": 16, "rope_parameters": MROPE, **MOE}
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=_qwen3_vision(), **QWEN_TOKENS)
    return _seeded(hf.Qwen3VLMoeForConditionalGeneration, config)


def _idefics3() -> PreTrainedModel:
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT), vision_config=VISION, image_token_id=IMAGE, scale_factor=2
    )
    return _seeded(hf.Idefics3ForConditionalGeneration, config)


def _smolvlm() -> PreTrainedModel:
    config = hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=VISION, image_token_id=IMAGE, scale_factor=2
    )
    return _seeded(hf.SmolVLMForConditionalGeneration, config)


def _paligemma() -> PreTrainedModel:
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.GemmaConfig(**TEXT, head_dim=16),
        image_token_index=IMAGE,
        projection_dim=64,
    )
    return _seeded(hf.PaliGemmaForConditionalGeneration, config)


def _gemma3() -> PreTrainedModel:
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=64),
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=True),
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    return _seeded(hf.Gemma3ForConditionalGeneration, config)


def _internvl() -> PreTrainedModel:
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**VISION),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return _seeded(hf.InternVLForConditionalGeneration, config)


def _mllama() -> PreTrainedModel:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 2,
        "attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2]],
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
    }
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    config = hf.MllamaConfig(
        vision_config=hf.MllamaVisionConfig(**vision), text_config=hf.MllamaTextConfig(**text), image_token_index=VOCAB
    )  # its image token has an embedding past the vocabulary
    return _seeded(hf.MllamaForConditionalGeneration, config)


def _pixtral() -> PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**VISION),
        text_config=hf.MistralConfig(**TEXT, head_dim=16),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _seeded(hf.LlavaForConditionalGeneration, config)


def _mistral3() -> PreTrainedModel:
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**VISION),
        text_config=hf.MistralConfig(**TEXT, head_dim=24),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return _seeded(hf.Mistral3ForConditionalGeneration, config)


def _opt() -> PreTrainedModel:
    text = {k: v for k, v in TEXT.items() if k not in ("intermediate_size", "num_key_value_heads")}
    return _seeded(hf.OPTForCausalLM, hf.OPTConfig(**text, ffn_dim=96, word_embed_proj_dim=32))


def _deepseek_v3() -> PreTrainedModel:
    latent = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    experts |= {"moe_intermediate_size": 24, "first_k_dense_replace": 1}
    config = hf.DeepseekV3Config(**{**TEXT, "num_key_value_heads": 4}, **latent, **experts)
    return _seeded(hf.DeepseekV3ForCausalLM, config)


def _deepseek_v2() -> PreTrainedModel:
    latent = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
    config = hf.DeepseekV2Config(
        **{**TEXT, "num_key_value_heads": 4}, **latent, **experts, first_k_dense_replace=1, topk_method="greedy"
    )
    return _seeded(hf.DeepseekV2ForCausalLM, config)


GLM_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
GLM_MOE |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
GLM_VISION = {
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": PATCH,
        "image_size": SIDE,
        "out_hidden_size": 64,
        "intermediate_size": 48,
    },
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
}


def _glm4_moe() -> PreTrainedModel:
    return _seeded(hf.Glm4MoeForCausalLM, hf.Glm4MoeConfig(**TEXT, head_dim=16, **GLM_MOE))


def _glm4v_moe() -> PreTrainedModel:
    config = hf.Glm4vMoeConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}, **GLM_MOE},
        **GLM_VISION,
    )
    return _seeded(hf.Glm4vMoeForConditionalGeneration, config)


def _llama4() -> PreTrainedModel:
    experts = {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 1,
    }
    config = hf.Llama4TextConfig(**TEXT, head_dim=16, attention_chunk_size=64, attn_temperature_tuning=False, **experts)
    return _seeded(hf.Llama4ForCausalLM, config)


def _gemma4_moe() -> PreTrainedModel:
    layers = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "enable_moe_block": True}
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    config = hf.Gemma4TextConfig(**TEXT, head_dim=16, sliding_window=64, **layers, **experts)
    return _seeded(hf.Gemma4ForCausalLM, config)


def _qwen3_5_moe() -> PreTrainedModel:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text = {**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}, **linear, **MOE}
    text |= {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 24}
    vision = _qwen3_vision()
    del vision["deepstack_visual_indexes"]
    config = hf.Qwen3_5MoeConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    return _seeded(hf.Qwen3_5MoeForConditionalGeneration, config)


def _qwen3_5() -> PreTrainedModel:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text = {**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}, **linear}
    vision = _qwen3_vision()
    del vision["deepstack_visual_indexes"]
    config = hf.Qwen3_5Config(
        text_config={**text, "layer_types": ["linear_attention", "full_attention"]}, vision_config=vision, **QWEN_TOKENS
    )
    return _seeded(hf.Qwen3_5ForConditionalGeneration, config)


def _glm4v() -> PreTrainedModel:
    config = hf.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
        **GLM_VISION,
    )
    return _seeded(hf.Glm4vForConditionalGeneration, config)


def _gemma4_text() -> PreTrainedModel:
    layers = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0}
    return _seeded(hf.Gemma4ForCausalLM, hf.Gemma4TextConfig(**TEXT, head_dim=16, sliding_window=64, **layers))


def _gpt_oss() -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return _seeded(hf.GptOssForCausalLM, hf.GptOssConfig(**TEXT, head_dim=16, sliding_window=64, **experts))


def _gpt2() -> PreTrainedModel:
    return _seeded(
        hf.GPT2LMHeadModel,
        hf.GPT2Config(
            vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
        ),
    )


def _falcon() -> PreTrainedModel:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "bos_token_id", "eos_token_id")
    return _seeded(hf.FalconForCausalLM, hf.FalconConfig(**{name: TEXT[name] for name in names}))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "internvl": _internvl,
    "mllama": _mllama,
    "pixtral": _pixtral,
    "mistral3": _mistral3,
    "llama": lambda: _seeded(hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT)),
    "mistral": lambda: _seeded(hf.MistralForCausalLM, hf.MistralConfig(**TEXT)),
    "qwen2": lambda: _seeded(hf.Qwen2ForCausalLM, hf.Qwen2Config(**TEXT, tie_word_embeddings=True)),
    "qwen3": lambda: _seeded(hf.Qwen3ForCausalLM, hf.Qwen3Config(**TEXT, head_dim=24)),
    "opt": _opt,
    "gemma": lambda: _seeded(hf.GemmaForCausalLM, hf.GemmaConfig(**{**TEXT, "num_key_value_heads": 1}, head_dim=16)),
    "gemma3_text": lambda: _seeded(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=64)),
    "phi3": lambda: _seeded(hf.Phi3ForCausalLM, hf.Phi3Config(**TEXT)),
    "smollm3": lambda: _seeded(hf.SmolLM3ForCausalLM, hf.SmolLM3Config(**TEXT)),
    "qwen3_moe": lambda: _seeded(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**TEXT, head_dim=16, **MOE)),
    "mixtral": lambda: _seeded(
        hf.MixtralForCausalLM, hf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    ),
}
VLMS = tuple(FAMILIES)[: list(FAMILIES).index("llama")]
# Families that only benchmarks/families.py runs. Their blocks are of kinds that tests of every family do not describe
# (linear attention, latent attention), add nothing to those, or have no linear that can be compressed.
FURTHER: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_5": _qwen3_5,
    "glm4v": _glm4v,
    "gemma2": lambda: _seeded(hf.Gemma2ForCausalLM, hf.Gemma2Config(**TEXT, head_dim=16, sliding_window=64)),
    "gemma4_text": _gemma4_text,
    "olmo2": lambda: _seeded(hf.Olmo2ForCausalLM, hf.Olmo2Config(**TEXT)),
    "granite": lambda: _seeded(hf.GraniteForCausalLM, hf.GraniteConfig(**TEXT)),
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "glm4v_moe": _glm4v_moe,
    "llama4": _llama4,
    "gemma4_moe": _gemma4_moe,
    "qwen3_5_moe": _qwen3_5_moe,
    "falcon": _falcon,
    "gpt2": _gpt2,
}


def text_inputs(model: PreTrainedModel, *, batch: int = 1, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random text without any special token: int64 [batch, length], every position counted."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def example_inputs(model: PreTrainedModel, *, batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """For a vision-language model: text with one random image per row; for a language model: text."""
    inputs = text_inputs(model, batch=batch, seed=seed)
    if not hasattr(model.config, "vision_config"):
        return inputs
    kind = model.config.model_type
    tokens, pixel_shape, more = _image_format(model.config, batch)
    generator = torch.Generator().manual_seed(seed + 1)
    image = torch.full((batch, tokens), model.config.image_token_id)
    before, after = inputs["input_ids"].split((2, 10), dim=1)
    start, end = (torch.full((batch, 1), token) for token in (VISION_START, VISION_END))
    ids = torch.cat((before, start, image, end, after), dim=1)
    is_image = (ids == model.config.image_token_id).long()
    if kind.startswith(("qwen", "glm4v")):
        more["mm_token_type_ids"] = is_image
    if kind == "gemma3":
        more["token_type_ids"] = is_image
    if kind == "mllama":
        more["cross_attention_mask"] = torch.ones(batch, ids.shape[1], 1, 2, dtype=torch.long)
    pixels = torch.randn(pixel_shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **more}


def _image_format(config: Any, batch: int) -> tuple[int, tuple[int, ...], dict[str, torch.Tensor]]:
    """Image tokens per row, shape of `pixel_values`, and the other inputs, which describe the image."""
    kind, plain = config.model_type, (batch, 3, SIDE, SIDE)
    sizes = {"image_sizes": torch.tensor([[SIDE, SIDE]] * batch)}
    if kind.startswith(("qwen", "glm4v")):  # flattened patches of two frames, four of them to a token
        grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * batch)
        return 4, (16 * batch, 3 * 2 * PATCH**2), {"image_grid_thw": grid}
    if kind in ("llava_next", "llava_onevision"):
        # The whole image, then two tiles side by side with a line end after each row.
        return 16 + 4 * (8 + 1), (batch, 3, 3, SIDE, SIDE), {"image_sizes": torch.tensor([[SIDE, 2 * SIDE]] * batch)}
    if kind in ("idefics3", "smolvlm"):
        mask = {"pixel_attention_mask": torch.ones(batch, 1, SIDE, SIDE, dtype=torch.bool)}
        return 4, (batch, 1, 3, SIDE, SIDE), mask
    if kind == "mllama":  # two tiles; one token stands for the image, cross-attention reads it
        ratios = {"aspect_ratio_ids": torch.full((batch, 1), 2), "aspect_ratio_mask": torch.ones(batch, 1, 2).long()}
        return 1, (batch, 1, 2, 3, SIDE, SIDE), ratios
    return {
        "llava": (16, plain, sizes if config.vision_config.model_type == "pixtral" else {}),
        "mistral3": (4, plain, sizes),
        "paligemma": (16, plain, {}),
        "gemma3": (4, plain, {}),
        "internvl": (4, plain, {}),
    }[kind]
