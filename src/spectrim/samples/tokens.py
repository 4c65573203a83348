"""Tokens that a model cannot take: those it does not know, and those that stand for an image that is not there."""

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedConfig

from spectrim.errors import SampleError

_TOKENS = ("image_token", "boi_token", "video_token", "audio_token", "boa_token")  # of processors and tokenizers
_IDS = tuple(f"{kind}_token_{name}" for kind in ("image", "video", "audio") for name in ("id", "index"))  # of configs


def media_ids(config: PreTrainedConfig) -> list[int]:
    """Ids of the tokens that stand for a piece of an image, a video or a sound; none where the config names none."""
    return [token for name in _IDS if isinstance(token := getattr(config, name, None), int)]


def media_tokens(processor: Any, config: PreTrainedConfig | None = None) -> tuple[str, ...]:
    """These tokens as text, for a processor or tokenizer and the config of its model."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = {getattr(holder, name, None) for holder in (processor, tokenizer) for name in _TOKENS}
    if config is not None:
        known = len(tokenizer)
        tokens.update(tokenizer.convert_ids_to_tokens(token) for token in media_ids(config) if 0 <= token < known)
    return tuple(sorted(token for token in tokens if isinstance(token, str) and token))


def refuse_media(text: str, tokens: Collection[str], where: str) -> None:
    """Raise SampleError where a text holds one of these tokens; a tokenizer never reads them as plain text."""
    for token in tokens:
        if token in text:
            raise SampleError(
                f"{where} holds '{token}' as text, which the model would take for an image or other media; remove it "
                "or write it otherwise"
            )


def check_tokens(ids: torch.Tensor, config: PreTrainedConfig, *, window: int = 0) -> None:
    """Raise SampleError unless a model knows all these tokens, int64, and has positions for a window of so many."""
    text_config = config.get_text_config()
    limit, vocabulary = (getattr(text_config, key, None) for key in ("max_position_embeddings", "vocab_size"))
    if isinstance(limit, int) and 0 < limit < window:
        raise SampleError(
            f"windows of {window} tokens exceed the model's {limit} positions; lower the window length (seqlen)"
        )
    ids = ids[~torch.isin(ids, torch.tensor(media_ids(config), dtype=ids.dtype))]  # these may lie past the vocabulary
    if isinstance(vocabulary, int) and ids.numel() and (largest := int(ids.max())) >= vocabulary:
        raise SampleError(
            f"the tokenizer gives token {largest} and the model knows {vocabulary}; use the model's own tokenizer"
        )
