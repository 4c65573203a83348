"""Images with an instruction, opened one at a time."""

import io
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

from PIL import Image, UnidentifiedImageError

from spectrim.errors import SampleError
from spectrim.samples.sources import hub_rows, local_path, read_jsonl

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class ImageSample:
    """One image and what is asked about it."""

    image: Image.Image  # RGB
    instruction: str
    answer: str | None = None


@dataclass(frozen=True)
class _Entry:
    open: Callable[[], Image.Image]
    instruction: str
    answer: str | None = None


class ImageSamples(Sequence[ImageSample]):
    """A sequence that decodes an image only when it is asked for, so that memory does not grow with the samples."""

    def __init__(self, entries: Sequence[_Entry]) -> None:
        self._entries = tuple(entries)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> ImageSample: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageSamples": ...
    def __getitem__(self, index: int | slice) -> "ImageSample | ImageSamples":
        if isinstance(index, slice):
            return ImageSamples(self._entries[index])
        entry = self._entries[index]
        return ImageSample(entry.open(), entry.instruction, entry.answer)


def load_images(
    source: str,
    *,
    samples: int,
    seed: int,
    split: str = "calibration",
    instruction: str = "Describe this image.",
) -> Sequence[ImageSample]:
    """Image samples of a source, chosen at random without repetition; the same for the same arguments.

    Args:
        source: ``builtin`` (images of every built-in task in equal parts); a folder of images, searched with its
            subfolders; a ``.jsonl`` file of ``{"image": path, "instruction" or "question": ..., "answer": ...}`` with
            paths relative to the file; else a Hugging Face data set id, ``id[:config[:split]]``, with a
            column ``image``.
        samples: how many.
        seed: of the choice and the order.
        split: "train", "calibration" or "test"; local sources have one split only and ignore it.
        instruction: for samples that carry none; the built-in ones always get it.

    Returns:
        A sequence that opens each image when it is indexed; that raises SampleError when the image is broken.

    Raises:
        SampleError: the source is missing, malformed, or has fewer images than ``samples``.
    """
    if samples < 1:
        raise SampleError(f"samples must be at least 1, not {samples}")
    if source == "builtin":
        return ImageSamples(_builtin(samples, seed, split, instruction))
    path = local_path(source, _SUFFIXES)
    if path is None:
        rows = hub_rows(source, split, column="image", seed=seed)
        entries = [_hub_entry(source, row, instruction) for row in itertools.islice(rows, samples)]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
        entries = [_Entry(partial(_open, file, str(file)), instruction) for file in files]
    elif path.suffix.lower() == ".jsonl":
        entries = [_jsonl_entry(path, number, row, instruction) for number, row in read_jsonl(path)]
    else:
        raise SampleError(f"image source '{source}' is neither a folder of images nor a .jsonl file; give one of these")
    if len(entries) < samples:
        raise SampleError(
            f"image source '{source}' has {len(entries)} images and {samples} were asked for; "
            "add images or lower the samples"
        )
    return ImageSamples(random.Random(seed).sample(entries, samples))


def _builtin(samples: int, seed: int, split: str, instruction: str) -> list[_Entry]:
    from spectrim.demo.tasks import TASKS, questions

    per_task = -(-samples // len(TASKS))
    pooled = [question.image for task in TASKS for question in questions(task, split, per_task, seed)]
    chosen = random.Random(seed).sample(pooled, samples)
    return [_Entry(partial(_rgb, image), instruction) for image in chosen]


def _jsonl_entry(path: Path, number: int, row: dict[str, Any], instruction: str) -> _Entry:
    asked, answer = row.get("instruction", row.get("question", instruction)), row.get("answer")
    if not isinstance(row.get("image"), str):
        raise SampleError(f'{path}, line {number} has no string "image"; write the path of an image')
    if not isinstance(asked, str) or not isinstance(answer, str | None):
        raise SampleError(f"{path}, line {number}: instruction and answer must be strings")
    image = path.parent / row["image"]
    if not image.is_file():
        raise SampleError(f"{path}, line {number} names the image '{row['image']}', which does not exist")
    return _Entry(partial(_open, image, f"{image} ({path}, line {number})"), asked, answer)


def _hub_entry(source: str, row: dict[str, Any], instruction: str) -> _Entry:
    asked, answer = row.get("instruction", row.get("question", instruction)), row.get("answer")
    image = row["image"]
    data = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(data, bytes):
        raise SampleError(f"data set '{source}': the column 'image' holds no images; give a data set of images")
    return _Entry(
        partial(_open, data, f"an image of data set '{source}'"),
        str(asked),
        answer if isinstance(answer, str) else None,
    )


def _open(origin: Path | bytes, label: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(origin) if isinstance(origin, bytes) else origin) as image:
            return _rgb(image)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise SampleError(f"{label} cannot be read as an image ({error}); repair or remove it") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct way
    return image.convert("RGB")
