"""Samples with labels: the tokens whose loss a gradient pass differentiates."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.calibrate.data import Data
from spectrim.calibrate.passes import model_inputs
from spectrim.errors import ModelError, SampleError
from spectrim.samples import Batch, Modality, media_ids


@dataclass(frozen=True)
class Labelled:
    """One sample of ``tokens`` tokens and the positions that carry a label.

    ``labelled`` bool [tokens - 1]: position p, which predicts token p + 1, has a label. Prompt tokens, image tokens
    and padding have none; in plain text all have one. Labels are the sample's own tokens, or drawn from the model's
    distribution by ``sampler``, which makes the gradients those of the true Fisher information.
    """

    modality: Modality
    inputs: dict[str, torch.Tensor]  # on the model's device
    labelled: torch.Tensor
    sampler: torch.Generator | None

    def targets(self, logits: torch.Tensor) -> torch.Tensor:
        """Labels int64 [labels] of the ``logits`` float [labels, vocabulary] at the labelled positions."""
        if self.sampler is None:
            return self.inputs["input_ids"][0, 1:][self.labelled]
        chances = logits.detach().softmax(-1).cpu()
        return torch.multinomial(chances, 1, generator=self.sampler)[:, 0].to(logits.device)


@dataclass(frozen=True)
class Known:
    """What earlier passes over the samples found: drawn answers by sample, and modalities of which all was checked."""

    answers: dict[int, torch.Tensor] = field(default_factory=dict)
    checked: set[Modality] = field(default_factory=set)


def together(samples: Iterable[Labelled], size: int) -> Iterator[list[Labelled]]:
    """Neighbours of equal shapes, at most `size` of them at a time."""
    group: list[Labelled] = []
    for sample in samples:
        alike = group and all(x.shape == group[0].inputs[name].shape for name, x in sample.inputs.items())
        if group and (len(group) >= size or not alike):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def labelled_samples(
    model: PreTrainedModel,
    data: Data,
    modality: Modality,
    *,
    sampled: bool,
    answer_tokens: int,
    seed: int,
    numbers: range,
    known: Known | None = None,
) -> Iterator[Labelled]:
    """The samples of one modality that have these numbers, one by one, each with its labels.

    Text is labelled at every token. An image sample ends with its answer; where it brings none, with one that the
    model draws from its own distribution (at most ``answer_tokens`` tokens), so that no labels are ever needed. With
    ``sampled``, the labels at those positions are drawn too.

    Raises:
        ModelError: the model cannot generate, or its tokens see the labels.
        SampleError: an image sample has an empty answer and the model no token that ends one.
    """
    known = known or Known()
    for number, batch in enumerate(data.batches(modality, 1)):
        if number not in numbers:
            continue
        inputs = model_inputs(model, batch)
        draw = (seed * 1_000_003 + number) % 2**63
        sampler = torch.Generator().manual_seed(draw) if sampled else None
        length = inputs["input_ids"].shape[1]
        first = modality not in known.checked
        known.checked.add(modality)
        if modality == "text":
            if first:
                check_causal(model, inputs, 1, "choose a recipe that needs no gradients")
            yield Labelled(modality, inputs, torch.ones(length - 1, dtype=torch.bool, device=model.device), sampler)
            continue
        if number not in known.answers:
            known.answers[number] = _answer(model, data, batch, inputs, answer_tokens, draw)
        answer = known.answers[number]
        inputs = _extended(inputs, answer)
        if first:
            check_causal(model, inputs, length, "calibrate curvature on text alone")
        where = torch.arange(length + len(answer) - 1, device=model.device) >= length - 1
        yield Labelled(modality, inputs, where, sampler)


def _end(model: PreTrainedModel) -> list[int]:
    """Tokens that end an answer."""
    token: Any = getattr(model.generation_config, "eos_token_id", None)
    return [] if token is None else [token] if isinstance(token, int) else list(token)


def _answer(
    model: PreTrainedModel, data: Data, batch: Batch, inputs: dict[str, torch.Tensor], limit: int, draw: int
) -> torch.Tensor:
    """Token ids [n], n ≥ 1, of the sample's answer with its end, or of one drawn from the model."""
    if (answer := batch.answers[0]) is not None:
        tokenizer: Any = getattr(data.processor, "tokenizer", None)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + _end(model)[:1]
        if not ids:
            raise SampleError("an image sample has an empty answer; write one, or leave the answer out")
        return torch.tensor(ids, device=model.device)
    if not model.can_generate():
        raise ModelError(f"{type(model).__name__} cannot generate; give image samples with answers")
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(draw)
        # Plain sampling: the model's own distribution, whatever its generation config prefers.
        generate: Any = model.generate
        plain: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        plain |= {"repetition_penalty": 1.0, "num_beams": 1}
        plain["suppress_tokens"] = media_ids(model.config) or None  # no answer may hold a piece of an image
        sequence = generate(**inputs, **plain, do_sample=True, max_new_tokens=limit, use_cache=True)
    drawn: torch.Tensor = sequence[0, inputs["input_ids"].shape[1] :]
    return drawn


def _extended(inputs: dict[str, torch.Tensor], answer: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs with the answer after the prompt; other tensors of one entry for each token grow with it.

    The attention mask grows by ones. Token types and what cross-attention sees are those of the prompt's last token.
    """
    shape = inputs["input_ids"].shape
    longer = dict(inputs)
    for name, value in inputs.items():
        if value.shape[:2] == shape and not value.is_floating_point():  # pixels may be as many by chance
            last = value[:, -1:].repeat_interleave(len(answer), dim=1)
            longer[name] = torch.cat([value, answer[None] if name == "input_ids" else last], dim=1)
    return longer


@torch.no_grad()
def check_causal(model: PreTrainedModel, inputs: dict[str, torch.Tensor], prompt: int, advice: str) -> None:
    """Raise ModelError for a model whose tokens attend to later tokens, so that a prediction depends on its label.

    Predictions from position ``prompt - 1`` on are compared; a model without logits passes.
    """
    ids = inputs["input_ids"]
    others = ids[0, :-1][ids[0, :-1] != ids[0, -1]]
    if not len(others):
        return
    changed = ids.clone()
    changed[0, -1] = others[-1]  # from near the end, where no image token stands
    seen: list[Any] = [
        getattr(model(**inputs | {"input_ids": x}, use_cache=False), "logits", None) for x in (ids, changed)
    ]
    if any(logits is None for logits in seen):  # run_gradients refuses it
        return
    first, second = (logits[0, prompt - 1 : -1].float() for logits in seen)
    rounding = max(1e-3, 8 * torch.finfo(model.dtype).eps)  # kernels may round differently, no more
    if (first - second).abs().max() > rounding * first.abs().max():
        raise ModelError(
            f"the tokens of {type(model).__name__} attend to later ones, so a prediction depends on its label; {advice}"
        )
