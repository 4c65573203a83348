"""Perplexity of a text over strided windows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from math import exp, inf
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from spectrim.calibrate.labels import check_causal
from spectrim.errors import ModelError, NumericalError, SampleError
from spectrim.samples import check_tokens, media_tokens
from spectrim.samples.beginning import beginning
from spectrim.samples.sources import check_positive
from spectrim.samples.tokens import refuse_media

Progress = Callable[[int, int], None]  # (done, total)
_PROBE = 16  # tokens that show whether a model looks ahead


@dataclass(frozen=True)
class Window:
    """Inputs `begin … end-1` of a token stream; the predictions made at `score … end-1` are counted."""

    begin: int
    score: int
    end: int


@dataclass(frozen=True)
class Reading:
    """A text as a model reads it: windows of one token stream, each begun with the tokenizer's own first tokens."""

    stream: Tensor  # int64; its first token is context only
    begin: Tensor  # int64, maybe empty; the last one takes the place of a window's first input
    windows: list[Window]
    bytes: int  # UTF-8, of the counted tokens

    def inputs(self, windows: list[Window]) -> Tensor:
        """Token ids [batch, ≤ seqlen] of windows."""
        rows = torch.stack([self.stream[w.begin : w.end] for w in windows])
        if len(self.begin):
            rows = torch.cat([self.begin.expand(len(rows), -1), rows[:, 1:]], dim=1)
        return rows


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text: `nll` is the sum of negative log-likelihoods in nats over `tokens` tokens.

    `bytes` counts the UTF-8 bytes of exactly those tokens; `per_token` = exp(nll / tokens) compares models of one
    tokenizer, `per_byte` = exp(nll / bytes) models of different ones. `seconds` is wall time without tokenization.
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
        raise SampleError(f"stride must lie between 1 and seqlen, but stride is {stride} and seqlen is {seqlen}")
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


def read_text(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    seqlen: int,
    stride: int | None,
    max_tokens: int | None,
) -> Reading:
    """The windows that :func:`perplexity` makes of a text; errors are found before the model is loaded.

    Raises:
        ModelError: the config is that of an encoder and a decoder.
        SampleError: as :func:`perplexity`.
    """
    if config.is_encoder_decoder:
        raise ModelError(
            f"a {config.model_type} has a decoder that reads an encoder, so that plain text has no perplexity; choose "
            "a causal language model"
        )
    check_positive(seqlen=seqlen, max_tokens=max_tokens)
    refuse_media(text, media_tokens(tokenizer, config), "the text for perplexity")
    begin = beginning(tokenizer, text)
    inner = seqlen - max(0, len(begin) - 1)  # inputs of a window, its beginning counted as one
    stride = inner if stride is None else min(stride, inner) if 1 <= stride <= seqlen else stride
    if inner < 1:
        raise SampleError(f"seqlen {seqlen} has no room for text after the tokenizer's {len(begin)} first tokens")
    first = begin[-1] if begin else tokenizer.bos_token_id
    stream, nbytes = _token_stream(tokenizer, text, first, max_tokens)
    windows = plan_windows(len(stream) - 1, inner, stride)
    reading = Reading(stream, torch.tensor(begin, dtype=torch.int64), windows, nbytes)
    check_tokens(stream, config, window=reading.inputs(windows[:1]).shape[1])
    return reading


def _token_stream(
    tokenizer: PreTrainedTokenizerBase, text: str, before: int | None, max_tokens: int | None
) -> tuple[Tensor, int]:
    """Token stream (int64, first token is context only) that begins with ``before`` if any, UTF-8 bytes counted."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = encoded["input_ids"]
    first = 0 if before is not None else 1  # without a token before it the first token is not predicted
    count = len(ids) if max_tokens is None else min(len(ids), max_tokens + first)
    skipped, kept = 0, len(text)  # the characters text[skipped:kept] are those of the counted tokens
    if count > 0 and (first > 0 or count < len(ids)):
        if not tokenizer.is_fast:
            raise SampleError(
                f"{type(tokenizer).__name__} gives no character offsets, so the bytes of a part of the text cannot be "
                "counted; use a fast tokenizer with a BOS token and leave max_tokens unset"
            )
        offsets = encoded["offset_mapping"]
        # A character may span several tokens: stop before a token that would cut one.
        while first < count < len(ids) and offsets[count][0] < offsets[count - 1][1]:
            count -= 1
        skipped = offsets[0][1] if first else 0
        kept = len(text) if count == len(ids) else offsets[count - 1][1]
    if count <= first:
        raise SampleError(
            f"{max(0, count - first)} of the text's {len(ids)} tokens can be scored; give more text or tokens"
        )
    stream = ids[:count] if before is None else [before, *ids[:count]]
    return torch.tensor(stream), len(text[skipped:kept].encode())


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

    Every window begins with what the tokenizer puts before every text (BOS with Llama and Gemma; nothing with Qwen and
    GPT-2), as in calibration; see :func:`spectrim.samples.beginning.beginning`. A tokenizer that has BOS and does not
    add it gives it once, before the text, so that the text's first token is counted too; without BOS that token is
    context only. Other special tokens are not added. `max_tokens` cuts the text after that many counted tokens, at the
    end of a whole character.

    Windows are batched without padding, so the batch size changes the result by rounding only. Logits are
    [batch, seqlen, vocabulary]: lower `batch_size` when memory is short. Log-likelihoods are float32 (float64 for a
    float64 model), their sum is float64.

    Raises:
        SampleError: for a text that is too short or holds tokens that stand for images, a stride outside 1 … seqlen, a
            seqlen beyond the model's limit, or a tokenizer with more tokens than the model knows.
        ModelError: when the model is no causal language model.
        NumericalError: when logits are NaN or infinite; names the window.
    """
    check_positive(batch_size=batch_size)
    reading = read_text(model.config, tokenizer, text, seqlen=seqlen, stride=stride, max_tokens=max_tokens)
    stream, windows = reading.stream, reading.windows
    if "input_ids" not in signature(model.forward).parameters:
        raise ModelError(f"{type(model).__name__} reads no tokens and is no language model; choose one that is")
    nll, start = 0.0, perf_counter()
    with inference(model):
        probe = reading.inputs(windows[:1])[:, :_PROBE].to(model.device)
        check_causal(model, {"input_ids": probe}, 1, "choose a causal language model for perplexity")
        for first in range(0, len(windows), batch_size):
            group = windows[first : first + batch_size]
            inputs = reading.inputs(group).to(model.device)  # [batch, ≤ seqlen]
            output = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False)
            logits = getattr(output, "logits", None)
            if logits is None or logits.shape[:2] != inputs.shape:
                raise ModelError(
                    f"{type(model).__name__} predicts no tokens and is no language model; choose one that has a "
                    "language head"
                )
            for index, (window, row) in enumerate(zip(group, logits, strict=True), start=first):
                if not torch.isfinite(row).all():
                    raise NumericalError(
                        f"the logits of perplexity window {index} (tokens {window.begin} to {window.end} of the text) "
                        "are not finite; check the model's weights or use a wider dtype"
                    )
                targets = stream[window.score + 1 : window.end + 1].to(row.device)
                scores = row[-len(targets) :].to(torch.promote_types(row.dtype, torch.float32))
                nll += cross_entropy(scores, targets, reduction="none").double().sum().item()
            if progress is not None:
                progress(first + len(group), len(windows))
    tokens = windows[-1].end
    return Perplexity(nll, tokens, reading.bytes, _exp(nll / tokens), _exp(nll / reading.bytes), perf_counter() - start)


def _exp(nats: float) -> float:
    try:
        return exp(nats)
    except OverflowError:
        return inf
