"""What a page is made of: results of evaluations and benchmarks, checkpoints, and the mismatch of statistics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from spectrim.bench import Attempt, Benchmark, Frontier
from spectrim.bench.frontier import last_part
from spectrim.calibrate import Statistics
from spectrim.calibrate.manifest import MANIFEST
from spectrim.checkpoint import load, read_provenance
from spectrim.checkpoint.model_files import PROVENANCE
from spectrim.demo import resolve
from spectrim.errors import ReportError
from spectrim.files import read_object, user_path
from spectrim.mismatch.analysis import Inspection, check_text, inspect
from spectrim.report.layout import PLAN, Layout, layout

Progress = Callable[[str, int, int], None]

_RESULTS, _INSPECTION = "results.json", "inspection.json"


@dataclass(frozen=True)
class Material:
    """All that a page shows."""

    frontiers: tuple[Frontier, ...] = ()
    benches: tuple[Benchmark, ...] = ()
    layouts: tuple[Layout, ...] = ()
    inspections: tuple[Inspection, ...] = ()


def read(
    results: Sequence[str | Path], *, model: str | Path | None = None, progress: Progress | None = None
) -> Material:
    """Read what is named; of results also the checkpoints that they are of, where these are still there.

    Statistics are analysed with the dense model: `model`, or else the one that the results name. Everything is read and
    checked before that.

    Raises:
        ReportError: something is named that no page shows, twice, or statistics without a model.
        SpectrimError: a file is damaged; names it.
    """
    material, statistics, dense = read_files(results, model=model)
    report = None if progress is None else _staged(progress)
    inspections = [inspect(load(resolve(str(dense))), one, progress=report) for one in statistics]
    return replace(material, inspections=(*material.inspections, *inspections))


def read_files(
    results: Sequence[str | Path], *, model: str | Path | None
) -> tuple[Material, list[Statistics], str | Path | None]:
    """What can be read without running a model; the statistics to analyse, and the dense model for them.

    Raises as :func:`read` does.
    """
    paths = [user_path(path) for path in results]
    if not paths:
        raise ReportError("nothing is named to show; give results.json of an evaluation, checkpoints or statistics")
    if repeated := next((path for number, path in enumerate(paths) if path in paths[:number]), None):
        raise ReportError(f"{repeated} is named twice; name each once")
    frontiers: list[Frontier] = []
    benches: list[Benchmark] = []
    inspections: list[Inspection] = []
    statistics: list[Statistics] = []
    checkpoints: dict[Path, None] = {}
    for path in paths:
        kind, file = _kind(path)
        if kind == "statistics":
            statistics.append(Statistics.open(path))
            check_text(statistics[-1])
        elif kind == "checkpoint":
            checkpoints[path.resolve()] = None
        elif kind == "inspection":
            inspections.append(_parsed(Inspection, file))
        elif kind == "bench":
            benches.append(_parsed(Benchmark, file))
        else:
            frontiers.append(_with_recipes(Frontier.read(file)))
            # A folder that was moved holds its checkpoints beside the results.
            named = [Path(one.directory) for one in frontiers[-1].evaluation.results if one.compressed]
            there = [next((p for p in (one, file.parent / one.name) if _is_checkpoint(p)), None) for one in named]
            checkpoints |= {one.resolve(): None for one in there if one is not None}
    if model is not None and not statistics:
        raise ReportError("--model has no effect without statistics; leave it out, or name a statistics directory")
    dense = model or next((f.evaluation.reference for f in frontiers if f.evaluation.reference is not None), None)
    if statistics and dense is None:
        raise ReportError(
            f"{statistics[0].path} holds statistics, which are analysed with the dense model; name it by --model"
        )
    layouts = tuple(layout(path) for path in checkpoints)
    return Material(tuple(frontiers), tuple(benches), layouts, tuple(inspections)), statistics, dense


def _staged(progress: Progress) -> Callable[[int, int], None]:
    return lambda done, total: progress("inspect", done, total)


def _kind(path: Path) -> tuple[str, Path]:
    """What something is, and the file that says so. Raises ReportError for what no page shows."""
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return "statistics", path / MANIFEST
        if _is_checkpoint(path):
            return "checkpoint", path / PLAN
        for name in (_RESULTS, _INSPECTION):
            if (path / name).is_file():
                return _kind(path / name)
        raise ReportError(
            f"{path} holds no results, no checkpoint that spectrim compress wrote and no statistics; name one that does"
        )
    try:
        content = read_object(path)
    except ValueError as error:
        raise ReportError(f"{error}; name results.json of spectrim evaluate, pareto or bench") from error
    for kind, keys in (
        ("results", {"results", "settings"}),
        ("bench", {"rows", "about"}),
        ("inspection", {"effective_ranks", "linears"}),
    ):
        if keys <= content.keys():
            return kind, path
    raise ReportError(
        f"{path} holds nothing that the page shows; name results.json of spectrim evaluate, pareto or bench"
    )


def _is_checkpoint(path: Path) -> bool:
    return (path / PROVENANCE).is_file() and (path / PLAN).is_file()


def _parsed(kind: Any, path: Path) -> Any:
    try:
        return TypeAdapter(kind).validate_python(read_object(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReportError(f"{path} is damaged ({where}: {first['msg']}); write it again") from error


def _with_recipes(frontier: Frontier) -> Frontier:
    """With the recipes of those models that are still there and whose results do not say them."""
    known = {last_part(one.directory) for one in frontier.attempts if one.directory is not None}
    more = []
    for result in frontier.evaluation.results:
        path = Path(result.directory)
        if path.name in known or not _is_checkpoint(path):
            continue
        record = read_provenance(path)
        if isinstance(recipe := record.get("recipe"), dict):
            more.append(Attempt(str(recipe.get("name")), str(record.get("limit")), result.directory, None))
    return replace(frontier, attempts=(*frontier.attempts, *more))
