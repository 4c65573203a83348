"""Calibration samples with labels, in batches of one shape; some are left out of training and judge it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.calibrate.data import Data
from spectrim.calibrate.labels import Labelled, labelled_samples
from spectrim.calibrate.passes import prepared
from spectrim.forwards import forwards
from spectrim.samples import Modality

LEFT_OUT = 8  # one sample in so many is left out
_TOKENS = 512  # of samples of one shape that run together


@dataclass(frozen=True)
class Sample:
    """One sample, or some of one shape joined, and what the dense model's output head reads at its labels.

    ``states`` [labels, width] give the dense model's predictions without another pass through it; None where its head
    alone does not.
    """

    labelled: Labelled
    states: torch.Tensor | None

    @property
    def labels(self) -> int:
        """How many predictions there are."""
        return int(self.labelled.labelled.sum())


Samples = Mapping[Modality, Sequence[Sample]]


def gathered(model: PreTrainedModel, data: Data, *, answer_tokens: int, seed: int) -> dict[Modality, list[Sample]]:
    """All samples of all modalities (see `gathering`)."""
    with prepared(model):
        given: dict[str, Any] = {"answer_tokens": answer_tokens, "seed": seed}
        return {modality: list(gathering(model, data, modality, **given)) for modality in data.samples}


def gathering(
    model: PreTrainedModel, data: Data, modality: Modality, *, answer_tokens: int, seed: int
) -> Iterator[Sample]:
    """The samples one by one: text labelled at every token, images at answers that they bring or the model draws.

    Raises:
        ModelError: the model cannot generate answers, or its tokens see the labels.
        SampleError: an image sample has an empty answer and the model no token that ends one.
    """
    given: dict[str, Any] = {"sampled": False, "answer_tokens": answer_tokens, "seed": seed}
    alone: bool | None = None
    for one in labelled_samples(model, data, modality, **given, numbers=range(data.samples[modality])):
        with torch.no_grad():
            alone = head_predicts(model, one) if alone is None else alone
            found = read(model, one) if alone else None
        yield Sample(one, found)


def predicted(model: PreTrainedModel, one: Labelled) -> torch.Tensor:
    """Logits [labels, vocabulary] at the labelled positions of samples of one shape."""
    logits: torch.Tensor = model(**one.inputs, use_cache=False).logits
    return logits[:, :-1][one.labelled.view(len(logits), -1)]


def read(model: PreTrainedModel, one: Labelled) -> torch.Tensor:
    """What the model's output head reads there [labels, width]; it does not run."""
    head: Any = model.get_output_embeddings()
    with forwards({head: lambda states: states}):
        return predicted(model, one)


def head_predicts(model: PreTrainedModel, one: Labelled) -> bool:
    """Whether logits are what the output head gives; False where the model does more to them, or has no head."""
    head: Any = model.get_output_embeddings()
    if head is None:
        return False
    found, logits = head(read(model, one)), predicted(model, one)
    return found.shape == logits.shape and torch.allclose(found.float(), logits.float(), rtol=1e-3, atol=1e-3)


def divided(samples: Samples) -> tuple[dict[Modality, list[Sample]], dict[Modality, list[Sample]]]:
    """The samples that are trained on, and the last eighth, at least one, that is left out.

    They are in random order, and compensation runs the first ones: to what it fitted, the start would be too near.
    """
    most = {modality: len(some) - max(1, len(some) // LEFT_OUT) for modality, some in samples.items()}
    trained = {modality: list(some[: most[modality]]) for modality, some in samples.items()}
    return trained, {modality: list(some[most[modality] :]) for modality, some in samples.items()}


def tokens(samples: Sequence[Sample]) -> int:
    """How many tokens there are in all."""
    return sum(one.labelled.inputs["input_ids"].numel() for one in samples)


def together(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of one shape joined, up to 512 tokens; ``labelled.labelled`` is bool [batch, tokens - 1] then."""
    groups: dict[tuple[object, ...], list[list[Sample]]] = {}
    for one in samples:
        inputs = one.labelled.inputs
        shapes = tuple((name, *value.shape) for name, value in sorted(inputs.items()))
        found = groups.setdefault((one.states is None, *shapes), [[]])
        if (len(found[-1]) + 1) * inputs["input_ids"].numel() > _TOKENS and found[-1]:
            found.append([])
        found[-1].append(one)
    return [_joined(group) for found in groups.values() for group in found]


def _joined(group: Sequence[Sample]) -> Sample:
    each = [one.labelled for one in group]
    inputs = {name: torch.cat([one.inputs[name] for one in each]) for name in each[0].inputs}
    read = [one.states for one in group if one.states is not None]
    whole = replace(each[0], inputs=inputs, labelled=torch.stack([one.labelled for one in each]))
    return Sample(whole, torch.cat(read) if read else None)
