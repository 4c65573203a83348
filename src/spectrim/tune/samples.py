"""Calibration samples with labels, in batches of one shape; some are left out of training and judge it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from spectrim.calibrate.data import Data
from spectrim.calibrate.labels import Labelled, labelled_samples
from spectrim.calibrate.passes import prepared
from spectrim.samples import Modality

LEFT_OUT = 8  # one sample in so many is left out
_TOKENS = 512  # of samples of one shape that run together

Samples = Mapping[Modality, Sequence[Labelled]]


def gathered(model: PreTrainedModel, data: Data, *, answer_tokens: int, seed: int) -> dict[Modality, list[Labelled]]:
    """All samples: text labelled at every token, images at the answers that they bring or that the model draws.

    Raises:
        ModelError: the model cannot generate answers, or its tokens see the labels.
        SampleError: an image sample has an empty answer and the model no token that ends one.
    """
    with prepared(model):
        return {
            modality: list(
                labelled_samples(
                    model,
                    data,
                    modality,
                    sampled=False,
                    answer_tokens=answer_tokens,
                    seed=seed,
                    numbers=range(count),
                )
            )
            for modality, count in data.samples.items()
        }


def divided(samples: Samples) -> tuple[dict[Modality, list[Labelled]], dict[Modality, list[Labelled]]]:
    """The samples that are trained on, and the last eighth, at least one, that is left out.

    They are in random order, and compensation runs the first ones: to what it fitted, the start would be too near.
    """
    most = {modality: len(some) - max(1, len(some) // LEFT_OUT) for modality, some in samples.items()}
    trained = {modality: list(some[: most[modality]]) for modality, some in samples.items()}
    return trained, {modality: list(some[most[modality] :]) for modality, some in samples.items()}


def tokens(samples: Sequence[Labelled]) -> int:
    """How many tokens there are in all."""
    return sum(one.inputs["input_ids"].numel() for one in samples)


def together(samples: Sequence[Labelled]) -> list[Labelled]:
    """Samples of one shape joined, up to 512 tokens; ``labelled`` is bool [batch, tokens - 1] then."""
    groups: dict[tuple[object, ...], list[list[Labelled]]] = {}
    for one in samples:
        shapes = tuple((name, *value.shape) for name, value in sorted(one.inputs.items()))
        found = groups.setdefault(shapes, [[]])
        if (len(found[-1]) + 1) * one.inputs["input_ids"].numel() > _TOKENS and found[-1]:
            found.append([])
        found[-1].append(one)
    return [_joined(group) for found in groups.values() for group in found]


def _joined(group: Sequence[Labelled]) -> Labelled:
    inputs = {name: torch.cat([one.inputs[name] for one in group]) for name in group[0].inputs}
    return replace(group[0], inputs=inputs, labelled=torch.stack([one.labelled for one in group]))
