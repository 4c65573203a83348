"""Questions about images: where they come from, and the same questions with their images swapped."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from spectrim.errors import SampleError


class Question(Protocol):
    """An RGB image, a question about it and the one short answer that counts as right."""

    @property
    def task(self) -> str:
        """Name of the task that the question belongs to."""

    @property
    def image(self) -> Image.Image:
        """The image, in mode RGB."""

    @property
    def question(self) -> str:
        """The question, without any prompt around it."""

    @property
    def answer(self) -> str:
        """The expected answer."""


@dataclass(frozen=True)
class ImageQuestion:
    """The plain form of :class:`Question`."""

    task: str
    image: Image.Image
    question: str
    answer: str


def load_questions(source: str, samples: int, seed: int) -> Sequence[Question]:
    """At most `samples` questions of each task, the same ones for the same seed.

    `builtin` draws `samples` test questions of every built-in task. Anything else is a .jsonl file with one
    {"image": path, "question": …, "answer": …} per line and optionally "task" (else the file's name is the task);
    image paths are relative to the file. When the file holds more than `samples` of a task, a random choice is kept.

    Raises:
        SampleError: for another kind of source, a malformed line (named by number) or an image that cannot be read.
    """
    if samples < 1:
        raise SampleError(f"samples must be at least 1, not {samples}.")
    if source == "builtin":
        from spectrim.demo.tasks import TASKS, questions  # the built-in suite is drawn only when asked for

        return [question for task in TASKS for question in questions(task, "test", samples, seed)]
    path = Path(source)
    if path.suffix != ".jsonl" or not path.is_file():
        raise SampleError(f"'{source}' is no source of questions; give 'builtin' or an existing .jsonl file.")
    tasks: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            record = _record(line, f"{path}, line {number}")
            tasks.setdefault(record.get("task", path.stem), []).append((number, record))
    if not tasks:
        raise SampleError(f"{path} holds no question; write one JSON object per line.")
    loaded = []
    for task, records in tasks.items():
        chosen = sorted(Random(seed).sample(range(len(records)), min(samples, len(records))))
        for number, record in (records[i] for i in chosen):
            image = _image(path.parent / record["image"], f"{path}, line {number}")
            loaded.append(ImageQuestion(task, image, record["question"], record["answer"]))
    return loaded


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise SampleError(f"{where} is not valid JSON ({error}); write one object per line.") from error
    if not isinstance(record, dict):
        raise SampleError(f"{where} is not a JSON object; write one object per line.")
    for key in ("image", "question", "answer", "task"):
        value = record.get(key, "" if key != "task" else "default")
        if not isinstance(value, str) or not value.strip():
            raise SampleError(f'{where} has no text under "{key}"; each line needs "image", "question" and "answer".')
    return record


def _image(path: Path, where: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise SampleError(f"{where} names the image {path}, which cannot be read ({error}).") from error


def blind_questions(questions: Sequence[Question]) -> list[ImageQuestion]:
    """The same questions in the same order, each with the image of another question of its task.

    Accuracy on them is the floor that a model reaches from the question alone. Inside a task the questions are sorted
    by image content and the images rotated by the size of the largest set of equal images: no question keeps its own
    image, every image is used as often as before, and the order of the questions does not matter.

    Raises:
        SampleError: when more than half of a task's questions share one image, so that no such swap exists.
    """
    digests = [sha256(repr(q.image.size).encode() + q.image.tobytes()).hexdigest() for q in questions]
    swapped: dict[int, ImageQuestion] = {}
    for task in {q.task: None for q in questions}:
        order = sorted((i for i, q in enumerate(questions) if q.task == task), key=lambda i: digests[i])
        largest = max(len(list(group)) for _, group in groupby(order, key=lambda i: digests[i]))
        if 2 * largest > len(order):
            raise SampleError(
                f"{largest} of the {len(order)} questions of task '{task}' share one image, so a blind baseline cannot "
                "be formed; add questions about other images or switch the baseline off."
            )
        for position, i in enumerate(order):
            image = questions[order[(position + largest) % len(order)]].image
            swapped[i] = ImageQuestion(task, image, questions[i].question, questions[i].answer)
    return [swapped[i] for i in range(len(questions))]
