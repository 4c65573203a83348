"""The samples of one calibration, checked against the model that will read them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from spectrim.calibrate.statistics import Statistics
from spectrim.errors import SampleError, StatisticsError
from spectrim.samples import (
    Batch,
    ImageSample,
    Modality,
    chat_prompt,
    check_tokens,
    data_fingerprint,
    image_batches,
    load_images,
    load_windows,
    media_tokens,
    text_batches,
)
from spectrim.samples.sources import local_path
from spectrim.settings import counts

SAMPLE_SETTINGS = {"samples", "seqlen", "seed", "instruction"}  # settings that choose the samples of a source


@dataclass(frozen=True)
class Data:
    """Token windows, image samples, or both."""

    windows: torch.Tensor | None  # int64 [samples, seqlen]
    images: Sequence[ImageSample]
    processor: ProcessorMixin | None  # of the images

    @property
    def samples(self) -> dict[Modality, int]:
        """How many samples each modality has; only modalities that have any."""
        sizes: dict[Modality, int] = {
            "text": 0 if self.windows is None else len(self.windows),
            "image": len(self.images),
        }
        return {modality: size for modality, size in sizes.items() if size}

    def part(self, chosen: slice) -> "Data":
        """Some of the samples of each modality."""
        return replace(self, windows=None if self.windows is None else self.windows[chosen], images=self.images[chosen])

    def batches(self, modality: Modality, batch_size: int) -> Iterator[Batch]:
        """The batches of one modality, in an order that depends on the samples alone."""
        if modality == "text":
            return iter(()) if self.windows is None or not len(self.windows) else text_batches(self.windows, batch_size)
        return iter(()) if self.processor is None else image_batches(self.images, self.processor, batch_size)

    def fingerprint(self) -> str:
        """SHA-256 of the content of all samples."""
        return data_fingerprint(self.windows, self.images, self.processor)


def load_data(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    *,
    text: str | tuple[str, ...] | None,
    images: str | tuple[str, ...] | None,
    samples: int,
    seqlen: int,
    seed: int,
    instruction: str,
    sees: bool,
) -> Data:
    """Load and check the samples of a calibration; ``sees``: the model has a vision tower.

    Raises:
        SampleError: there is nothing to load, or it does not fit the model.
    """
    if not sees and images not in (None, "builtin"):
        named = ", ".join([images] if isinstance(images, str) else images or ())
        raise SampleError(f"a language model without a vision tower takes no images; leave out the source '{named}'")
    if not sees:
        images = None
    if text is None and images is None:
        raise SampleError("calibration needs samples; give a text source, an image source or both")
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    windows = None if text is None else _windows(model, processor, text, samples, seqlen, seed)
    if images is None:
        return Data(windows, (), None)
    if not isinstance(processor, ProcessorMixin):
        raise SampleError("image samples need the model's processor and not its tokenizer alone; pass the processor")
    shown = load_images(images, samples=samples, seed=seed, instruction=instruction)
    shown.refuse(media_tokens(processor, model.config))
    for entry in shown.entries:  # so that errors come before the passes
        prompt = chat_prompt(processor, entry.turns, entry.where)
        ids = tokenizer(prompt + (entry.answer or ""), add_special_tokens=False, verbose=False)["input_ids"]
        check_tokens(torch.tensor(ids), model.config)
    return Data(windows, shown, processor)


def check_there(statistics: Statistics) -> None:
    """Raise SampleError where a file or folder of samples that statistics were gathered from is gone."""
    source = statistics.manifest.data
    each = [counts(sources, 1) for sources in (source.text, source.images) if sources is not None]
    for name in [name for names in each for name in names]:
        try:
            local_path(name)
        except SampleError as error:
            raise SampleError(
                f"the samples of {statistics.path} are needed again, and {name} is gone; restore it, calibrate again, "
                "or choose a recipe that only needs the statistics, such as laser"
            ) from error


def source_data(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    statistics: Statistics,
    *,
    sees: bool,
    **other: int,
) -> Data:
    """Samples from the sources of statistics, chosen as theirs were but for `other` settings (``samples``, ``seed``).

    Raises SampleError where they cannot be loaded.
    """
    source, settings = statistics.manifest.data, statistics.manifest.settings
    chosen = settings.model_dump(include=SAMPLE_SETTINGS) | other
    return load_data(model, processor, text=source.text, images=source.images, sees=sees, **chosen)


def reload_data(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    statistics: Statistics,
    *,
    sees: bool,
    samples: int | None,
) -> Data:
    """The samples that statistics were gathered from, or the first of each modality; they are in random order.

    Raises:
        SampleError: they cannot be loaded any more.
        StatisticsError: they are other samples now.
    """
    check_there(statistics)
    data = source_data(model, processor, statistics, sees=sees)
    if data.fingerprint() != statistics.manifest.data.fingerprint:
        raise StatisticsError(
            f"the samples are not those of {statistics.path} any more; restore them or calibrate again"
        )
    return data.part(slice(samples))


def _windows(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    sources: str | tuple[str, ...],
    samples: int,
    seqlen: int,
    seed: int,
) -> torch.Tensor:
    check_tokens(torch.empty(0, dtype=torch.int64), model.config, window=seqlen)  # before the text is read
    refused = media_tokens(processor, model.config)
    windows = load_windows(sources, processor, samples=samples, seqlen=seqlen, seed=seed, refused=refused)
    check_tokens(windows, model.config)
    return windows
