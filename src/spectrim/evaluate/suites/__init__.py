"""Benchmark suites: plain YAML that names a harness and its tasks, and their scores."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table

from spectrim.errors import SampleError
from spectrim.files import parse_yaml, user_path, write_whole


class Suite(BaseModel):
    """Tasks of one harness, by the names that the harness gives them.

    ``images`` says that tasks of lm-eval show images; those of lmms-eval may always. ``num_fewshot`` None leaves each
    task its own number of examples. ``task_folder`` holds further task files; it is relative to the suite's file.
    ``retention`` is the metric, such as ``acc``, whose share of the first model's is averaged over the tasks that have
    it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    summary: str = ""
    paper: str = ""
    harness: Literal["lm-eval", "lmms-eval"]
    tasks: tuple[str, ...] = Field(min_length=1)
    images: bool = False
    num_fewshot: int | None = Field(default=None, ge=0)
    task_folder: str | None = None
    retention: str | None = None

    @classmethod
    def read(cls, source: str | Path) -> "Suite":
        """A suite by its built-in name or from a YAML file.

        Raises:
            SampleError: there is no such suite, or the file is none.
        """
        path = Path(source)
        if path.suffix.lower() not in (".yaml", ".yml"):
            if str(source) not in suite_names():
                raise SampleError(
                    f"there is no suite '{source}'; choose from {', '.join(suite_names())} or name a .yaml file"
                )
            path = Path(str(files(__package__).joinpath(f"{source}.yaml")))
        try:
            suite = cls.model_validate(parse_yaml(path.read_bytes()))
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, first["loc"]))
            raise SampleError(f"suite '{source}': key '{at}': {first['msg']}; see docs/evaluation.md") from error
        except OSError as error:
            raise SampleError(f"suite '{source}' cannot be read ({error.strerror}); name a .yaml file") from error
        except ValueError as error:
            raise SampleError(f"suite '{source}' cannot be read: it {error}; correct it") from error
        if suite.task_folder is None:
            return suite
        return suite.model_copy(update={"task_folder": str(path.parent / suite.task_folder)})


def suite_names() -> tuple[str, ...]:
    """Names of the built-in suites, sorted."""
    names = files(__package__).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in names if file.name.endswith(".yaml")))


@dataclass(frozen=True)
class Score:
    """One metric of one task, in the harness's own unit, with its standard error where the harness gives one."""

    task: str
    metric: str
    value: float
    error: float | None


@dataclass(frozen=True)
class SuiteReport:
    """Scores by model directory, in the order given; `limit` is how many samples of each task were asked at most."""

    suite: Suite
    date: str  # UTC, ISO 8601
    versions: dict[str, str | None]
    limit: int | None
    scores: dict[str, tuple[Score, ...]]

    def retention(self) -> dict[str, float]:
        """What models keep of the first one's quality: the mean of their ratios to it over tasks, by model directory.

        Nothing for suites that name no metric for it, and for tasks of which the first model gets nothing right.
        """
        own = {
            name: {score.task: score.value for score in scores if score.metric == self.suite.retention}
            for name, scores in self.scores.items()
        }
        first = next(iter(own.values()), {})
        tasks = [task for task, value in first.items() if value > 0]
        return {name: fmean(values[task] / first[task] for task in tasks) for name, values in own.items() if tasks}

    def json(self) -> str:
        """Indented JSON."""
        content = {**asdict(self), "suite": self.suite.model_dump(mode="json"), "retention": self.retention()}
        return json.dumps(content, indent=2) + "\n"

    def write(self, path: str | Path) -> None:
        """Write JSON; the file appears whole or not at all."""
        write_whole(user_path(path), self.json().encode())


def read_scores(output: Mapping[str, Any], tasks: Sequence[str]) -> tuple[Score, ...]:
    """The scores of `tasks` in what either harness returns; a group without scores of its own gives its members'.

    Raises SampleError if a task has none.
    """
    results, members = output["results"], output.get("group_subtasks") or {}
    scores: list[Score] = []
    for task in tasks:
        own = _scores(task, results.get(task, {}))
        own = own or [score for member in members.get(task, ()) for score in _scores(member, results.get(member, {}))]
        if not own:
            raise SampleError(f"the harness gave no score for task '{task}'; take it out of the suite")
        scores += own
    return tuple(scores)


def _scores(task: str, row: Mapping[str, Any]) -> list[Score]:
    """Scores of one task from a harness, which names them ``metric,filter`` and ``metric_stderr,filter``.

    The harness writes ``none`` as the filter of a metric without a filter.
    """
    scores = []
    for key, value in row.items():
        metric, _, rule = key.partition(",")
        if rule and "_stderr" not in metric and isinstance(value, int | float):
            error = row.get(f"{metric}_stderr,{rule}")
            shown = metric if rule == "none" else f"{metric} ({rule})"
            scores.append(Score(task, shown, float(value), error if isinstance(error, float) else None))
    return scores


def suite_table(report: SuiteReport) -> Table:
    """One row per metric, one column per model: value ± standard error."""
    caption = None if report.limit is None else f"the first {report.limit} samples of each task: not the benchmark"
    grid = Table(title=f"Suite {report.suite.name}", caption=caption, box=None, padding=(0, 1, 0, 0))
    for heading in ("task", "metric", *(Path(name).name for name in report.scores)):
        grid.add_column(heading, no_wrap=True)
    columns = [{(score.task, score.metric): score for score in scores} for scores in report.scores.values()]
    for task, metric in dict.fromkeys(key for column in columns for key in column):
        cells = [column.get((task, metric)) for column in columns]
        grid.add_row(task, metric, *("–" if cell is None else _cell(cell) for cell in cells))
    if kept := report.retention():
        grid.add_row(
            "quality retention", f"mean of {report.suite.retention} ratios", *(f"{x:.4f}" for x in kept.values())
        )
    return grid


def _cell(score: Score) -> str:
    return f"{score.value:.4f}" if score.error is None else f"{score.value:.4f} ± {score.error:.4f}"
