"""Images with what is asked about them, opened one sample at a time."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

from PIL import Image

from spectrim.errors import SampleError
from spectrim.samples.chat import TURNS, Message, as_parts, joined, question, read_chat, texts
from spectrim.samples.pixels import open_image, opener, to_rgb
from spectrim.samples.sources import IMAGES, by_key, check_positive, hub_rows, local_path, named_columns
from spectrim.samples.tables import count_rows, is_table, read_rows
from spectrim.samples.tokens import refuse_media
from spectrim.settings import counts

_ASKED, _ANSWERS = ("instruction", "question", "prompt"), ("answer", "completion")  # keys of a row
_KEYS = ("image", "images", *_ASKED, *_ANSWERS, "caption", *TURNS, "system")


@dataclass(frozen=True)
class ImageSample:
    """A conversation about images, up to where its last answer begins, and that answer."""

    images: tuple[Image.Image, ...]  # RGB, in the order of their places in the turns
    turns: tuple[Message, ...]
    answer: str | None = None
    where: str = "an image sample"  # where it came from, for messages


@dataclass(frozen=True)
class Entry:
    """An image sample whose images are not opened yet."""

    openers: tuple[Callable[[], Image.Image], ...]
    turns: tuple[Message, ...]
    answer: str | None
    where: str

    def open(self) -> ImageSample:
        """The sample with its images. Raises SampleError for an image that is broken."""
        return ImageSample(tuple(opener() for opener in self.openers), self.turns, self.answer, self.where)


class ImageSamples(Sequence[ImageSample]):
    """A sequence that decodes images only when they are asked for, so that memory does not grow with the samples."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> ImageSample: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageSamples": ...
    def __getitem__(self, index: int | slice) -> "ImageSample | ImageSamples":
        return ImageSamples(self.entries[index]) if isinstance(index, slice) else self.entries[index].open()

    def refuse(self, tokens: Sequence[str]) -> None:
        """Raise SampleError where a sample holds one of these tokens, which stand for media, as text."""
        for entry in self.entries:
            for text in (*texts(entry.turns), entry.answer or ""):
                refuse_media(text, tokens, entry.where)


def load_images(
    sources: str | tuple[str, ...],
    *,
    samples: int,
    seed: int,
    instruction: str = "Describe this image.",
    fewer: bool = False,
) -> ImageSamples:
    """Image samples of a source, chosen at random without repetition; the same for the same arguments.

    Args:
        sources: ``builtin`` (images of every built-in task in equal parts); a folder of images, searched with its
            subfolders; a ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file of rows with ``image`` (a path), with
            ``question``, ``instruction`` or ``prompt``, and ``answer`` or ``completion``, or with a ``caption`` (the
            answer to ``instruction``), or of conversations about images (see ``read_chat``; the last turn is the answer
            where it is the assistant's), with paths relative to the file; else a Hugging Face data set id,
            ``id[:config[:split]]``, with a column ``image`` or ``images``. Several images of a row are a list; a
            parquet file may hold the images themselves. Other columns stand in brackets behind the source (see
            ``named_columns``). Of several sources, ``NAME`` or ``NAME:WEIGHT``, each gives its share (see
            ``settings.counts``).
        samples: how many, of all sources together.
        seed: of the choice and the order.
        instruction: for samples that carry none; the built-in ones always get it.
        fewer: a source with fewer samples gives those that it has, at least one.

    Returns:
        A sequence that opens the images of a sample when it is indexed; that raises SampleError when one is broken.

    Raises:
        SampleError: a source is missing, malformed, or has fewer samples than it is to give.
    """
    check_positive(samples=samples, seed=seed)
    try:
        instruction.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"the instruction {instruction!r} holds half a character; write it in UTF-8") from error
    found: list[Entry] = []
    for name, count in counts(sources, samples).items():
        if count:
            found += _entries(name, count, seed, instruction, fewer)
    if not isinstance(sources, str):
        random.Random(seed).shuffle(found)
    return ImageSamples(found)


def _entries(source: str, samples: int, seed: int, instruction: str, fewer: bool) -> list[Entry]:
    """The samples of one source, in random order."""
    if source == "builtin":
        return _builtin(samples, seed, instruction)
    columns, path = named_columns(source, _KEYS), local_path(source)
    if path is not None and is_table(path):
        rows = read_rows(path, _KEYS, columns)
        if path.suffix.lower() == ".parquet":  # holds images: only those that are chosen stay in memory
            places = _chosen(source, count_rows(path), samples, seed, fewer)
            kept: set[int] = set(places)
            held: dict[int, Entry] = {}
            for number, (where, row) in enumerate(rows):
                entry = _entry(_plain(row), path.parent, where, instruction)
                if number in kept:
                    held[number] = entry
            return [held[place] for place in places]
        entries = [_entry(row, path.parent, where, instruction) for where, row in rows]
    elif path is not None and path.is_dir() and not columns:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
        entries = [
            Entry((partial(open_image, file, str(file)),), question(instruction), None, str(file)) for file in files
        ]
    elif path is None:
        found = hub_rows(source, "calibration", columns=tuple(columns.values()) or ("image", "images"), seed=seed)
        entries = [
            _entry(_plain(by_key(row, columns)), None, where, instruction)
            for where, row in itertools.islice(found, samples)
        ]
    else:
        raise SampleError(
            f"image source '{source}' is neither a folder of images nor a .jsonl, .csv or .parquet file; give one of "
            "these"
        )
    return [entries[place] for place in _chosen(source, len(entries), samples, seed, fewer)]


def _chosen(source: str, there: int, samples: int, seed: int, fewer: bool) -> list[int]:
    """Places of a source's samples, chosen at random, in random order."""
    samples = min(samples, max(1, there)) if fewer else samples
    if there < samples:
        raise SampleError(
            f"image source '{source}' has {there} images and {samples} were asked for; add images or lower the samples"
        )
    return random.Random(seed).sample(range(there), samples)


def _builtin(samples: int, seed: int, instruction: str) -> list[Entry]:
    from spectrim.demo.tasks import TASKS, questions

    per_task = -(-samples // len(TASKS))
    pooled = [asked.image for task in TASKS for asked in questions(task, "calibration", per_task, seed)]
    chosen = random.Random(seed).sample(pooled, samples)
    return [Entry((partial(to_rgb, image),), question(instruction), None, "a built-in image") for image in chosen]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a data set without answers that are not strings, such as lists of many people's answers."""
    return {key: value for key, value in row.items() if key not in ("answer", "caption") or isinstance(value, str)}


def _entry(row: dict[str, Any], base: Path | None, where: str, instruction: str) -> Entry:
    row = joined(row)
    named = _one_of(row, ("image", "images"), where)
    images = named if isinstance(named, list) else [] if named is None else [named]
    asked, answer = _one_of(row, _ASKED, where), _one_of(row, _ANSWERS, where)
    chat = read_chat(row, images, where)
    if chat is None and asked is None and answer is None:
        answer = row.get("caption")
    if not isinstance(asked, str | None) or not isinstance(answer, str | None):
        raise SampleError(f"{where}: what is asked and its answer must be strings")
    if chat is not None:
        if asked is not None:
            raise SampleError(f"{where} has both a conversation and a single question; keep one of them")
        turns, images = chat.turns, list(chat.images)
        if turns[-1]["role"] == "assistant":
            if answer is not None:
                raise SampleError(f"{where} has an answer beside that of its last turn; keep one of them")
            turns, answer = turns[:-1], _answer(turns[-1], where)
        if not any(turn["role"] == "user" for turn in turns):
            raise SampleError(f"{where} has no turn of the user before the answer; add one")
    else:
        turns = question(instruction if asked is None else asked, len(images))
    if not images:
        kind = "shows no image; give it as a text source" if chat else 'has no string "image"; write the path of one'
        raise SampleError(f"{where} {kind}")
    return Entry(tuple(opener(image, base, where) for image in images), turns, answer, where)


def _one_of(row: dict[str, Any], keys: Sequence[str], where: str) -> Any:
    """The value that a row has under one of these keys; empty lists and null count as missing."""
    held = [key for key in keys if row.get(key) is not None and row[key] != []]
    if len(held) > 1:
        raise SampleError(f'{where} has both "{held[0]}" and "{held[1]}"; keep one of them')
    return row[held[0]] if held else None


def _answer(turn: Message, where: str) -> str:
    parts = as_parts(turn["content"])
    if any(part["type"] != "text" for part in parts):
        raise SampleError(f"{where} has an image in the answer; remove it")
    return "".join(part["text"] for part in parts)
