"""Samples with labels: the tokens whose loss a gradient pass differentiates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.calibrate.data import Data
from spectrim.errors import ModelError
from spectrim.samples import Batch, Modality


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


def labelled_samples(
    model: PreTrainedModel,
    data: Data,
    modality: Modality,
    *,
    sampled: bool,
    answer_tokens: int,
    seed: int,
    numbers: range,
) -> Iterator[Labelled]:
    """The samples of one modality that have these numbers, one by one, each with its labels.

    Text is labelled at every token. An image sample ends with its answer; where it brings none, with one that the
    model draws from its own distribution (at most ``answer_tokens`` tokens), so that no labels are ever needed. With
    ``sampled``, the labels at those positions are drawn too.

    Raises:
        ModelError: the model cannot generate, or its prompt tokens see the answer.
    """
    for number, batch in enumerate(data.batches(modality, 1)):
        if number not in numbers:
            continue
        inputs = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
            for name, value in batch.inputs.items()
        }
        draw = seed * 1_000_003 + number
        sampler = torch.Generator().manual_seed(draw) if sampled else None
        length = inputs["input_ids"].shape[1]
        if modality == "text":
            yield Labelled(modality, inputs, torch.ones(length - 1, dtype=torch.bool, device=model.device), sampler)
            continue
        answer = _answer(model, data, batch, inputs, answer_tokens, draw)
        inputs = _extended(inputs, answer)
        if number == numbers.start:
            _check_causal(model, inputs, length)
        where = torch.arange(length + len(answer) - 1, device=model.device) >= length - 1
        yield Labelled(modality, inputs, where, sampler)


def _end(model: PreTrainedModel) -> list[int]:
    """Tokens that end an answer."""
    found: Any = getattr(model.generation_config, "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _answer(
    model: PreTrainedModel, data: Data, batch: Batch, inputs: dict[str, torch.Tensor], limit: int, draw: int
) -> torch.Tensor:
    """Token ids [n], n ≥ 1, of the sample's answer with its end, or of one drawn from the model."""
    if (given := batch.answers[0]) is not None:
        tokenizer: Any = getattr(data.processor, "tokenizer", None)
        ids = tokenizer(given, add_special_tokens=False)["input_ids"] + _end(model)[:1]
        return torch.tensor(ids, device=model.device)
    if not model.can_generate():
        raise ModelError(f"{type(model).__name__} cannot generate; give image samples with answers")
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(draw)
        # Plain sampling: the model's own distribution, whatever its generation config prefers.
        generate: Any = model.generate
        sequence = generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=limit, use_cache=True
        )
    drawn: torch.Tensor = sequence[0, inputs["input_ids"].shape[1] :]
    return drawn


def _extended(inputs: dict[str, torch.Tensor], answer: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs with the answer after the prompt; other tensors of one entry for each token grow with it.

    The attention mask grows by ones. Token types grow by the type of the prompt's last token.
    """
    shape = inputs["input_ids"].shape
    longer = dict(inputs)
    for name, value in inputs.items():
        if value.shape == shape:
            tail = answer if name == "input_ids" else value[0, -1:].expand(len(answer))
            longer[name] = torch.cat([value, tail[None].to(value.dtype)], dim=1)
    return longer


@torch.no_grad()
def _check_causal(model: PreTrainedModel, inputs: dict[str, torch.Tensor], prompt: int) -> None:
    """A model whose prompt attends in both directions may see the labels; refuse rather than gather nonsense."""
    ids = inputs["input_ids"]
    changed = ids.clone()
    changed[0, -1] = ids[0, 0] if ids[0, -1] != ids[0, 0] else ids[0, prompt - 1]
    first, second = (
        model(**inputs | {"input_ids": x}, use_cache=False).logits[0, prompt - 1 : -1].float() for x in (ids, changed)
    )
    if (first - second).abs().max() > 1e-3 * first.abs().max():  # kernels may round differently, no more
        raise ModelError(
            f"the tokens of {type(model).__name__} see those after them, so that an answer sees itself; "
            "calibrate curvature on text alone"
        )
