"""How long the end-to-end pass takes: a few samples are gathered and gone through, and timed."""

import time
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.calibrate.data import Data
from spectrim.calibrate.passes import prepared
from spectrim.samples import Modality
from spectrim.tune.divergence import gradients, rough_products
from spectrim.tune.samples import Sample, gathering, together

_ENOUGH = 3.0  # seconds of steps after which no more are timed


def pace(
    model: PreTrainedModel, parts: Anatomy, data: Data, modality: Modality, *, answer_tokens: int, seed: int
) -> tuple[float, float]:
    """Seconds to gather a sample, and to pass over it once, of a dense model, which is left as it is.

    Its linears stand for those that take their place: factors have fewer products, in shapes that run less well.

    Raises:
        ModelError: the model cannot generate answers, or its tokens see the labels.
        SampleError: an image sample has an empty answer and the model no token that ends one.
    """
    weights = [model.get_submodule(linear.name).get_parameter("weight") for linear in parts.linears]
    before = [weight.requires_grad for weight in weights]
    found: list[Sample] = []

    def gathered() -> Iterator[int]:
        for one in gathering(model, data, modality, answer_tokens=answer_tokens, seed=seed):
            found.append(one)
            yield 1

    def passed() -> Iterator[int]:
        joined = together(found)
        for part in (joined[0], *joined):
            with rough_products(), torch.enable_grad():
                for _summands in gradients(model, model, part, weights):
                    pass
            yield len(part.labelled.labelled)

    with prepared(model):
        gather = _pace(gathered())
        try:
            for weight in weights:
                weight.requires_grad_(True)
            return gather, _pace(passed())
        finally:
            for weight, wanted in zip(weights, before, strict=True):
                weight.requires_grad_(wanted)


def _pace(steps: Iterator[int]) -> float:
    """Seconds for each sample of steps that say how many they took; the first warms up, and checks the model."""
    next(steps)
    began, count = time.perf_counter(), 0
    for number in steps:
        count += number
        if time.perf_counter() - began > _ENOUGH:
            break
    return (time.perf_counter() - began) / max(1, count)
