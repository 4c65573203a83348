"""Calibration samples for models that have no processor."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from families import example_inputs, text_inputs
from spectrim.samples import Batch, Modality


class Samples:
    """Random samples of a family whose processor is not there; stands for ``calibrate.data.Data``.

    As many of text as of images, for a model that takes images. None brings an answer.
    """

    windows, processor = None, None

    def __init__(self, model: PreTrainedModel, each: int = 8, first: int = 0) -> None:
        self._model, self._first = model, first
        self.images = range(each if hasattr(model.config, "vision_config") else 0)
        self.samples: dict[Modality, int] = {"text": each} | ({"image": each} if self.images else {})

    def part(self, chosen: slice) -> "Samples":
        """Some of them."""
        seeds = range(self.samples["text"])[chosen]
        return Samples(self._model, len(seeds), self._first + seeds.start)

    def batches(self, modality: Modality, size: int) -> Iterator[Batch]:
        """At most `size` samples at a time, each made by its own seed."""
        make = text_inputs if modality == "text" else example_inputs
        end = self._first + self.samples.get(modality, 0)
        for first in range(self._first, end, size):
            found = [make(self._model, seed=seed) for seed in range(first, min(first + size, end))]
            inputs = {name: torch.cat([one[name] for one in found]) for name in found[0]}
            yield Batch(modality, inputs, len(found), (None,) * len(found) if modality == "image" else ())

    def fingerprint(self) -> str:
        """They are the same at every call."""
        return f"{len(self.samples)} modalities of {self.samples['text']} random samples"
