"""The results of an evaluation as frozen dataclasses, and their JSON form."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from spectrim.errors import SampleError
from spectrim.evaluate.answering import Answer
from spectrim.evaluate.divergence import Divergence
from spectrim.evaluate.examples import Example
from spectrim.evaluate.footprint import Memory
from spectrim.evaluate.intervals import PairedDifference, paired_difference, wilson
from spectrim.evaluate.language import Perplexity
from spectrim.files import parse_json, user_path, write_whole
from spectrim.settings import EvaluationSettings
from spectrim.versions import release

SCHEMA = 1


def versions(*packages: str) -> dict[str, str | None]:
    """Releases of spectrim, of these packages and of Python."""
    return {
        "spectrim": release(),
        **{package: release(package) for package in packages},
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class TaskScore:
    """Exact-match accuracy on one task, with its 95 % Wilson interval [low, high]."""

    task: str
    questions: int
    correct: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class VqaScore:
    """Scores per task in order of first appearance; `mean` is the unweighted mean of the tasks' accuracies.

    `seconds` is wall time from the first prompt to the last answer, image processing included.
    """

    tasks: tuple[TaskScore, ...]
    mean: float
    questions: int
    seconds: float
    questions_per_second: float


@dataclass(frozen=True)
class TaskDifference:
    """Paired difference to the reference on one task; task None means all questions together."""

    task: str | None
    difference: PairedDifference


@dataclass(frozen=True)
class Source:
    """Where samples came from, and the SHA-256 of those that were used."""

    name: str
    sha256: str


@dataclass(frozen=True)
class DirectoryResult:
    """One evaluated model. `bytes` is what its safetensors occupy.

    `retention` and `predicted_loss` (nats per labelled token by modality, above the dense model's; ``joint`` is that of
    text plus `image_price` times that of images) are what its spectrim.json states; `differences` and `divergence` (by
    modality) are empty for the reference and where there is none. `answers` stays out of the JSON, but for those that
    are examples of the report.
    """

    directory: str
    compressed: bool
    device: str
    dtype: str
    bytes: int
    memory: Memory
    retention: dict[str, float] | None = None
    predicted_loss: dict[str, float] | None = None
    perplexity: Perplexity | None = None
    tokens_per_second: float | None = None
    vqa: VqaScore | None = None
    differences: tuple[TaskDifference, ...] = ()
    divergence: tuple[Divergence, ...] = ()
    answers: tuple[Answer, ...] = field(default=(), repr=False)
    image_price: float = 1.0

    @property
    def forecasts(self) -> list[tuple[str, float, float]]:
        """What is predicted, with the prediction and the divergence that was measured of it, in nats per token."""
        measured = {str(row.modality): row.mean for row in self.divergence}
        predicted = dict(self.predicted_loss or {})
        if "joint" in predicted and measured.keys() >= {"text", "image"}:
            both = f"text + {self.image_price:g} × image"
            predicted[both] = predicted.pop("joint")
            measured[both] = measured["text"] + self.image_price * measured["image"]
        return [(name, nats, measured[name]) for name, nats in predicted.items() if name in measured]


@dataclass(frozen=True)
class EvaluationReport:
    """Results of all directories, in the order given. `reference` is the dense one that the others are compared to.

    `blind` scores the reference (without one: the first directory) on images swapped inside each task: the floor that
    the question alone reaches. `examples` are a few questions with the answers of all models.
    """

    date: str  # UTC, ISO 8601
    versions: dict[str, str | None]  # None: run from a source tree that was never installed
    settings: EvaluationSettings
    text: Source | None
    questions: Source | None
    reference: str | None
    blind: VqaScore | None
    results: tuple[DirectoryResult, ...]
    examples: tuple[Example, ...] = ()
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Indented JSON; a perplexity beyond the range of floats is written as `Infinity`."""
        tree = asdict(self) | {"settings": self.settings.model_dump()}
        for result in tree["results"]:
            del result["answers"]
        return json.dumps({"schema": tree.pop("schema"), **tree}, indent=2, ensure_ascii=False) + "\n"

    def write(self, path: str | Path) -> None:
        """Writes the JSON; the file appears whole or not at all."""
        write_whole(user_path(path), self.to_json().encode())

    @classmethod
    def read(cls, path: str | Path) -> "EvaluationReport":
        """The report that :meth:`write` wrote, without the single answers.

        Raises:
            SampleError: when the file is missing, is no such report, or comes from a newer version.
        """
        try:
            report = TypeAdapter(cls).validate_python(parse_json(Path(path).read_bytes()))
        except (OSError, ValueError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
            raise SampleError(
                f"{path} is no evaluation report ({reason}); write one with `spectrim evaluate`"
            ) from error
        if report.schema != SCHEMA:
            raise SampleError(f"{path} has schema {report.schema}, this version reads {SCHEMA}; evaluate again")
        return report


def score(answers: Sequence[Answer], seconds: float) -> VqaScore:
    """Accuracy per task with Wilson intervals, and the mean over tasks."""
    tasks = []
    for task, marks in _by_task(answers).items():
        low, high = wilson(sum(marks), len(marks))
        tasks.append(TaskScore(task, len(marks), sum(marks), sum(marks) / len(marks), low, high))
    mean = sum(task.accuracy for task in tasks) / len(tasks)
    return VqaScore(tuple(tasks), mean, len(answers), seconds, len(answers) / seconds)


def differences(answers: Sequence[Answer], reference: Sequence[Answer]) -> tuple[TaskDifference, ...]:
    """Paired differences per task and over all questions (last); both must answer the same questions in one order."""
    ours, theirs = _by_task(answers), _by_task(reference)
    rows = [TaskDifference(task, paired_difference(marks, theirs[task])) for task, marks in ours.items()]
    overall = paired_difference([a.correct for a in answers], [a.correct for a in reference])
    return (*rows, TaskDifference(None, overall))


def _by_task(answers: Sequence[Answer]) -> dict[str, list[bool]]:
    marks: dict[str, list[bool]] = {}
    for answer in answers:
        marks.setdefault(answer.task, []).append(answer.correct)
    return marks
