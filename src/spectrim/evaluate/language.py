"""Perplexity of a text over strided windows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp, inf
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectrim.errors import NumericalError, SampleError

Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class Window:
    """Inputs `begin … end-1` of a token stream; the predictions made at `score … end-1` are counted."""

    begin: int
    score: int
    end: int


@dataclass(frozen=True)
class Perplexity:
    """What a model pays for a text: `nll` is the sum of negative log-likelihoods in nats over `tokens` tokens.

    `bytes` counts the UTF-8 bytes of exactly those tokens; `per_token` = exp(nll / tokens) compares models of one
    tokenizer, `per_byte` = exp(nll / bytes) models of different ones. `seconds` is wall time without tokenisation.
    """

    nll: float
    tokens: int
    bytes: int
    per_token: float
    per_byte: float
    seconds: float


def plan_windows(predictions: int, seqlen: int, stride: int) -> list[Window]:
    """Windows whose counted parts partition `0 … predictions-1` in order.

    All windows hold min(seqlen, predictions) inputs, so that a batch needs no padding. The first counts all its
    predictions; each later one moves on by `stride` and counts those, with the seqlen - stride inputs before them as
    context; the last moves on by what is left and has more context.

    Raises:
        SampleError: unless 1 ≤ stride ≤ seqlen.
    """
    if not 1 <= stride <= seqlen:
        raise SampleError(f"stride must lie between 1 and seqlen, but stride is {stride} and seqlen is {seqlen}.")
    windows, done = [], 0
    while done < predictions:
        end = min(predictions, done + (stride if done else seqlen))
        windows.append(Window(max(0, end - seqlen), done, end))
        done = end
    return windows


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: tensors that a model caches must stay fit for training
            yield
    finally:
        model.train(training)


def _token_stream(
    tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None
) -> tuple[Tensor, int | None, int]:
    """Token stream (int64, first token is context only), the BOS of every window if any, UTF-8 bytes counted."""
    bos = tokenizer.bos_token_id
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = encoded["input_ids"]
    first = 0 if bos is not None else 1  # without BOS nothing predicts the first token
    count = len(ids) if max_tokens is None else min(len(ids), max_tokens + first)
    skipped, kept = 0, len(text)  # the characters text[skipped:kept] are those of the counted tokens
    if count > 0 and (first > 0 or count < len(ids)):
        if not tokenizer.is_fast:
            raise SampleError(
                f"{type(tokenizer).__name__} gives no character offsets, so the bytes of a part of the text cannot be "
                "counted; use a fast tokenizer with a BOS token and leave max_tokens unset."
            )
        offsets = encoded["offset_mapping"]
        # A character may span several tokens: stop before a token that would cut one.
        while first < count < len(ids) and offsets[count][0] < offsets[count - 1][1]:
            count -= 1
        skipped = offsets[0][1] if first else 0
        kept = len(text) if count == len(ids) else offsets[count - 1][1]
    if count <= first:
        raise SampleError(
            f"{max(0, count - first)} of the text's {len(ids)} tokens can be scored; give more text or tokens."
        )
    stream = ids[:count] if bos is None else [bos, *ids[:count]]
    prompts_start_with_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
    return torch.tensor(stream), bos if prompts_start_with_bos else None, len(text[skipped:kept].encode())


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    seqlen: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `text` over windows of `seqlen` inputs; every token is counted exactly once.

    A token is predicted from the inputs of its window that precede it: at least one, at least seqlen - stride + 1 from
    the second window on. `stride=None` means seqlen, windows without overlap, as in the low-rank papers; a smaller
    stride costs seqlen / stride times as much and gives every token more context.

    BOS: when the tokenizer has one, it stands before the text and the text's first token is counted too; without one
    that token is context only. When the tokenizer also puts BOS before every ordinary prompt (Llama, Gemma), the model
    never saw a text without it, so BOS takes the place of the first input of every window. Other special tokens are
    not added. `max_tokens` cuts the text after that many counted tokens, at the end of a whole character.

    Windows are batched without padding, so the batch size changes the result by rounding only. Logits are
    [batch, seqlen, vocabulary]: lower `batch_size` when memory is short. Log-likelihoods are float32 (float64 for a
    float64 model), their sum is float64.

    Raises:
        SampleError: for a text that is too short, a stride outside 1 … seqlen, or a seqlen beyond the model's limit.
        NumericalError: when logits are NaN or infinite; names the window.
    """
    stride = seqlen if stride is None else stride
    stream, bos, nbytes = _token_stream(tokenizer, text, max_tokens)
    windows = plan_windows(len(stream) - 1, seqlen, stride)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and windows[0].end > limit:
        raise SampleError(f"seqlen {seqlen} exceeds the {limit} positions of the model; choose a smaller seqlen.")
    nll, start = 0.0, perf_counter()
    with inference(model):
        for first in range(0, len(windows), batch_size):
            group = windows[first : first + batch_size]
            inputs = torch.stack([stream[w.begin : w.end] for w in group])  # [batch, seqlen]
            if bos is not None:
                inputs[:, 0] = bos
            inputs = inputs.to(model.device)
            logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits
            for index, (window, row) in enumerate(zip(group, logits, strict=True), start=first):
                if not torch.isfinite(row).all():
                    raise NumericalError(
                        f"The logits of perplexity window {index} (tokens {window.begin} to {window.end} of the text) "
                        "are not finite; check the model's weights or use a wider dtype."
                    )
                targets = stream[window.score + 1 : window.end + 1].to(row.device)
                scores = row[window.score - window.begin :].to(torch.promote_types(row.dtype, torch.float32))
                nll += cross_entropy(scores, targets, reduction="none").double().sum().item()
            if progress is not None:
                progress(first + len(group), len(windows))
    tokens = windows[-1].end
    return Perplexity(nll, tokens, nbytes, _exp(nll / tokens), _exp(nll / nbytes), perf_counter() - start)


def _exp(nats: float) -> float:
    try:
        return exp(nats)
    except OverflowError:
        return inf
