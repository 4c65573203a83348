"""Questions about images: where they come from, and the same questions with their images swapped."""

from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import groupby
from random import Random
from typing import Any

from PIL import Image

from spectrim.demo.tasks import TASKS, Question, questions
from spectrim.errors import SampleError
from spectrim.files import user_path
from spectrim.samples.pixels import opener
from spectrim.samples.sources import check_positive, named_columns, split_columns
from spectrim.samples.tables import is_table, read_rows

_KEYS = ("image", "question", "answer", "task")


def load_questions(source: str, samples: int, seed: int) -> list[Question]:
    """At most `samples` questions of each task, the same ones for the same seed.

    `builtin` draws `samples` test questions of every built-in task. Anything else is a .jsonl, .csv, .tsv or .parquet
    file with image, question and answer in each row and optionally a task (else the file's name is the task); image
    paths are relative to the file, and a parquet file may hold the images themselves. When the file holds more than
    `samples` of a task, a random choice is kept.

    Raises:
        SampleError: for another kind of source, a malformed line (named by number) or an image that cannot be read.
    """
    check_positive(samples=samples, seed=seed)
    if source == "builtin":
        return [question for task in TASKS for question in questions(task, "test", samples, seed)]
    columns, path = named_columns(source, _KEYS), user_path(split_columns(source)[0])
    if not is_table(path) or not path.is_file():
        raise SampleError(
            f"'{source[:200]}' is no source of questions; give 'builtin' or an existing .jsonl, .csv or .parquet file"
        )
    tasks: dict[str, list[tuple[Callable[[], Image.Image], dict[str, Any]]]] = {}
    for where, row in read_rows(path, _KEYS, columns):
        _check_row(row, where)
        image = opener(row["image"], path.parent, where)
        tasks.setdefault(row.get("task") or path.stem, []).append((image, row))
    if not tasks:
        raise SampleError(f"{path} holds no question; write one JSON object per line")
    loaded = []
    for task, rows in tasks.items():
        chosen = sorted(Random(seed).sample(range(len(rows)), min(samples, len(rows))))
        for image, row in (rows[i] for i in chosen):
            loaded.append(Question(task, image(), row["question"], row["answer"]))
    return loaded


def _check_row(row: dict[str, Any], where: str) -> None:
    for key in _KEYS:
        value = row.get(key, "" if key != "task" else "default")
        if key == "image" and isinstance(value, bytes | dict):
            continue  # a parquet file holds it
        if not isinstance(value, str) or not value.strip():
            raise SampleError(f'{where} has no text under "{key}"; each line needs "image", "question" and "answer"')


def blind_questions(questions: Sequence[Question]) -> list[Question]:
    """The same questions in the same order, each with the image of another question of its task.

    Accuracy on them is the floor that a model reaches from the question alone. Inside a task the questions are sorted
    by image content and the images rotated by the size of the largest set of equal images: no question keeps its own
    image, every image is used as often as before, and the order of the questions does not matter.

    Raises:
        SampleError: when more than half of a task's questions share one image, so that no such swap exists.
    """
    digests = [sha256(repr(q.image.size).encode() + q.image.tobytes()).hexdigest() for q in questions]
    swapped: dict[int, Question] = {}
    for task in {q.task: None for q in questions}:
        order = sorted((i for i, q in enumerate(questions) if q.task == task), key=lambda i: digests[i])
        largest = max(len(list(group)) for _, group in groupby(order, key=lambda i: digests[i]))
        if 2 * largest > len(order):
            raise SampleError(
                f"{largest} of the {len(order)} questions of task '{task}' share one image, so a blind baseline cannot "
                "be formed; add questions about other images or switch the baseline off"
            )
        for position, i in enumerate(order):
            image = questions[order[(position + largest) % len(order)]].image
            swapped[i] = Question(task, image, questions[i].question, questions[i].answer)
    return [swapped[i] for i in range(len(questions))]
