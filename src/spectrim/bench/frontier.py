"""Quality over what it costs: an evaluation and a benchmark of the same models in one record."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from spectrim.bench.measure import Benchmark, Row
from spectrim.demo import resolve
from spectrim.errors import SampleError
from spectrim.evaluate.results import DirectoryResult, EvaluationReport
from spectrim.files import read_object, user_path, write_whole

_NONE = "–"


@dataclass(frozen=True)
class Attempt:
    """One recipe at one limit: where its checkpoint is or, where there can be none, the reason."""

    recipe: str
    limit: str
    directory: str | None
    reason: str | None


@dataclass(frozen=True)
class Point:
    """One model: what is known of its quality and of its cost; what was not measured is None.

    `name` is the last part of its directory, and `limit` the kind of limit that it keeps to: size, bits or retain.
    `accuracy` is the mean VQA accuracy in [0, 1] and `kept` its share of the
    dense model's; `divergence` is the KL divergence from the dense model by modality, nats per token. `bytes` are those
    of the weight files, `memory_bytes` those of the weights in memory, and `decode` seconds per token; `speed` is how
    many times as fast as the dense model it decodes.
    """

    name: str
    result: DirectoryResult
    recipe: str | None
    limit: str | None
    accuracy: float | None
    kept: float | None
    perplexity: float | None
    divergence: dict[str, float]
    bytes: int
    share: float | None
    decode: float | None
    speed: float | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Frontier:
    """Models of several recipes and sizes with what they can do and what they cost.

    In JSON it is the evaluation with two entries more, `bench` and `attempts`; a file of `spectrim evaluate` is one
    without them.
    """

    evaluation: EvaluationReport
    bench: Benchmark | None = None
    attempts: tuple[Attempt, ...] = ()

    def to_json(self) -> str:
        """Indented JSON."""
        tree = json.loads(self.evaluation.to_json())
        examples = tree.pop("examples")  # images come last
        more = {
            "bench": None if self.bench is None else asdict(self.bench),
            "attempts": list(map(asdict, self.attempts)),
        }
        return json.dumps({**tree, **more, "examples": examples}, indent=2, ensure_ascii=False) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the JSON, whole or not at all."""
        write_whole(user_path(path), self.to_json().encode())

    @classmethod
    def read(cls, path: str | Path) -> "Frontier":
        """What :meth:`write` or `EvaluationReport.write` wrote. Raises SampleError for what is none."""
        evaluation = EvaluationReport.read(path)
        content = read_object(Path(path))
        try:
            bench = content.get("bench")
            return cls(
                evaluation,
                None if bench is None else Benchmark.of(bench),
                TypeAdapter(tuple[Attempt, ...]).validate_python(content.get("attempts", [])),
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise SampleError(
                f"{path} is no record of a benchmark ({'.'.join(map(str, first['loc']))}: {first['msg']}); write one "
                "with `spectrim pareto`"
            ) from error

    def points(self, more: Sequence[Row] = ()) -> tuple[Point, ...]:
        """The models, the dense one first. Rows of `more` benchmarks count where this one has none of a model."""
        report = self.evaluation
        rows: dict[str, Row] = {}
        for row in (*(self.bench.rows if self.bench else ()), *more):
            rows.setdefault(last_part(row.model), row)
        made = {last_part(one.directory): one for one in self.attempts if one.directory is not None}
        dense = next((result for result in report.results if result.directory == report.reference), None)
        ordered = sorted(report.results, key=lambda result: result is not dense)
        return tuple(_point(result, dense, rows, made) for result in ordered)

    def table(self) -> Table:
        """The models and, below them, what could not be made; for a terminal."""
        grid = Table(title="Quality over size, speed and memory", box=None, pad_edge=False)
        for heading in (
            "model", "size, MB", "% of dense", "accuracy, %", "% kept", "perplexity", "KL text", "KL image",
            "decode, ×", "memory, MB",
        ):  # fmt: skip
            grid.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
        for point in self.points():
            grid.add_row(point.name, *cells(point))
        for attempt in self.attempts:
            if attempt.directory is None:
                grid.add_row(f"{attempt.recipe}-{attempt.limit}", *[_NONE] * 9, style="dim")
        return grid

    def lines(self) -> list[str]:
        """A sentence for each size that a recipe cannot reach."""
        return [
            f"{attempt.recipe}-{attempt.limit} cannot be: {attempt.reason}"
            for attempt in self.attempts
            if attempt.reason is not None
        ]


def cells(point: Point) -> tuple[str, ...]:
    """Size, share of the dense model, accuracy, kept, perplexity, KL of text and image, speed and memory, as text."""

    def number(value: float | None, form: str, factor: float = 1.0) -> str:
        return _NONE if value is None else format(factor * value, form)

    return (
        number(point.bytes, ".1f", 1e-6),
        number(point.share, ".0f", 100),
        number(point.accuracy, ".1f", 100),
        number(point.kept, ".0f", 100),
        number(point.perplexity, ".2f"),
        number(point.divergence.get("text"), ".4f"),
        number(point.divergence.get("image"), ".4f"),
        number(point.speed, ".2f"),
        number(point.memory_bytes, ".1f", 1e-6),
    )


def last_part(directory: str) -> str:
    """The name of a model: the last part of its path."""
    return Path(resolve(directory)).name or directory


def _point(
    result: DirectoryResult, dense: DirectoryResult | None, rows: dict[str, Row], made: dict[str, Attempt]
) -> Point:
    name = last_part(result.directory)
    row, attempt = rows.get(name), made.get(name)
    own = None if result.vqa is None else result.vqa.mean
    full = None if dense is None or dense.vqa is None else dense.vqa.mean
    return Point(
        name=name,
        result=result,
        recipe=None if attempt is None else attempt.recipe,
        limit=None if attempt is None else attempt.limit.partition("-")[0],
        accuracy=own,
        kept=own / full if own is not None and full else None,
        perplexity=None if result.perplexity is None else result.perplexity.per_token,
        divergence={str(row.modality): row.mean for row in result.divergence},
        bytes=result.bytes,
        share=None if dense is None else result.bytes / dense.bytes,
        decode=None if row is None else row.decode.median,
        speed=None if row is None else 1 / row.decode.ratio,
        memory_bytes=None if row is None else row.weight_bytes,
    )


def beside_dense(pairs: Sequence[Benchmark]) -> Benchmark:
    """One benchmark of several in which the dense model, always the first row, ran beside one other each time.

    Times of the others are those of the first dense row times their ratio to the dense row of their own run, so that
    load on the machine that came between two runs does not tell one model from another.
    """
    first = pairs[0].rows[0]
    rows = [first]
    for pair in pairs:
        rows += [_scaled(row, first) for row in pair.rows[1:]]
    about = f"{pairs[0].about}; each model beside the dense one, whose times of the first run hold for all"
    return Benchmark(tuple(rows), pairs[0].date, pairs[0].versions, about)


def _scaled(row: Row, dense: Row) -> Row:
    changes: dict[str, Any] = {}
    for name in ("prefill", "decode", "image", "step"):
        timing, reference = getattr(row, name), getattr(dense, name)
        if timing is not None and reference is not None:
            median = timing.ratio * reference.median
            changes[name] = replace(timing, median=median, spread=timing.spread * median / timing.median)
    factor = row.decode.median / changes["decode"].median
    return replace(row, **changes, tokens_per_second=row.tokens_per_second * factor)
