"""The Pareto front of one model: every recipe at every size, compressed, evaluated and timed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectrim.bench import Attempt, Benchmark, Frontier, bench
from spectrim.bench.frontier import beside_dense, last_part
from spectrim.calibrate import Statistics
from spectrim.checkpoint import load, load_processor, read_provenance
from spectrim.checkpoint.sources import read_config, sees
from spectrim.checks import check_device, check_directory, check_file, check_once
from spectrim.demo import resolve
from spectrim.errors import BudgetError, CheckpointError, RecipeError, UsageError
from spectrim.evaluate import evaluate
from spectrim.evaluate.running import check_directories, is_compressed, readable
from spectrim.files import read_object, user_path, write_whole
from spectrim.pipeline.budget import Budget
from spectrim.pipeline.jobs import Job, check_job
from spectrim.pipeline.run import compression
from spectrim.pipeline.stages import Progress
from spectrim.recipe import Recipe
from spectrim.settings import EvaluationOptions

RESULTS = "results.json"
_SOURCE = "pareto.json"  # says of which model and statistics the checkpoints beside it are


@dataclass(frozen=True)
class _Trial:
    """One recipe at one limit, and where its checkpoint goes."""

    job: Job
    target: Path

    @property
    def budget(self) -> Budget:
        return self.job.budgets[0]

    def finished(self) -> bool:
        """Whether the checkpoint is there; CheckpointError where something else is."""
        if not self.target.exists():
            return False
        record = read_provenance(self.target)
        if record.get("recipe") != self.job.recipe.model_dump(mode="json") or record.get("limit") != self.budget.label:
            raise CheckpointError(
                f"{self.target} is a checkpoint of another recipe or size; remove it, or name another directory by -o"
            )
        return True


@dataclass(frozen=True)
class Trials:
    """What is to be made and measured; `of` says of which model and samples, for the file beside the checkpoints."""

    source: str
    trials: tuple[_Trial, ...]
    options: EvaluationOptions
    of: dict[str, Any]


def pareto(
    model: str | Path,
    out: str | Path,
    *,
    stats: str | Path | Statistics,
    sizes: Sequence[str],
    recipes: Sequence[str | Path] = ("spectrim",),
    changes: dict[str, Any] | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **evaluation: Any,
) -> Frontier:
    """Compress a model by every recipe to every size, measure what the checkpoints can do and cost, and write it down.

    Checkpoints go to ``out/RECIPE-LIMIT`` and the record to ``out/results.json``. Checkpoints that an earlier run
    finished are kept, and not made again; all are measured.

    Args:
        model: the directory of a dense model, or "demo".
        out: the directory for checkpoints and results.
        stats: the statistics directory of the model.
        sizes: of all safetensors files of a checkpoint, such as "3.5GB", or of its linears, such as "40%".
        recipes: built-in names or YAML files; `changes` sets single values of all of them by dotted key.
        device, dtype: where and in what models run; the files' own dtype if None.
        trust_remote_code: run code that the model brings; it is written into the checkpoints, too.
        progress: is called with the stage, how much of it is done, and how much there is.
        evaluation: arguments of :func:`spectrim.evaluate`, such as samples; `tasks` are those that the model can do, if
            they are not named.

    Returns:
        What was measured, and which sizes which recipe cannot reach.

    Raises:
        BudgetError: no recipe reaches any size, or a size is none.
        SpectrimError: of the kind that says which input is at fault.
    """
    out, where = user_path(out), dict[str, Any](trust_remote_code=trust_remote_code)
    what: dict[str, Any] = {"stats": stats, "sizes": sizes, "recipes": recipes, "changes": changes}
    asked = trials(model, out, device=device, evaluation=evaluation, **what, **where)
    source = asked.source
    write_whole(out / _SOURCE, (json.dumps(asked.of, indent=2) + "\n").encode())
    reasons = _compress(source, asked.trials, progress, device=device, dtype=dtype, **where)
    attempts = tuple(
        Attempt(
            trial.job.recipe.name,
            trial.budget.label,
            None if trial.target in reasons else str(trial.target),
            reasons.get(trial.target),
        )
        for trial in asked.trials
    )
    paths = [source, *(attempt.directory for attempt in attempts if attempt.directory is not None)]
    if len(paths) == 1:
        raise BudgetError(f"no recipe reaches any of the sizes; of the first: {attempts[0].reason}")
    how: dict[str, Any] = {"device": device, "dtype": dtype, **where}
    report = evaluate(paths, progress=progress, **how, **dict(asked.options))
    pairs: list[Benchmark] = []
    for path in paths[1:]:  # two at a time, since models may be large
        names = [last_part(source), last_part(path)]
        pairs.append(bench([source, path], names=names, progress=_of(names[1], progress), **how))
    found = Frontier(report, beside_dense(pairs), attempts)
    found.write(out / RESULTS)
    return found


def _of(name: str, progress: Progress | None) -> Progress | None:
    """Progress of one checkpoint among several, whose stages have one name."""
    return None if progress is None else lambda stage, done, total: progress(f"bench {name}, {stage}", done, total)


def trials(
    model: str | Path,
    out: str | Path,
    *,
    stats: str | Path | Statistics,
    sizes: Sequence[str],
    recipes: Sequence[str | Path] = ("spectrim",),
    changes: dict[str, Any] | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    evaluation: Mapping[str, Any],
) -> Trials:
    """All that :func:`pareto` would make and measure, checked as far as that is known before a model loads.

    Raises as it does.
    """
    source, out = resolve(model), user_path(out)
    check_device(device)
    found = _trials(source, out, stats, sizes, recipes, changes, trust_remote_code)
    seeing = sees(read_config(source, {"trust_remote_code": trust_remote_code}))
    tasks = evaluation.get("tasks", ("perplexity", "vqa", "kl") if seeing else ("perplexity", "kl"))
    options = EvaluationOptions.checked(**{**evaluation, "tasks": tuple(tasks)})
    options.check_together()
    readable([Path(source)], options, trusted=trust_remote_code)
    return Trials(source, tuple(found), options, _checked_source(out, found))


def read_size(size: str) -> Budget:
    """The limit that a size stands for: "3.5GB" of all files, "40%" of the linears. Raises BudgetError."""
    text = size.strip()
    if not text.endswith("%"):
        return Budget(size=text)
    try:
        return Budget(retain=float(text[:-1]) / 100)
    except ValueError as error:
        raise BudgetError(f"{size!r} is no share; write it as 40%") from error


def _trials(
    source: str,
    out: Path,
    stats: str | Path | Statistics,
    sizes: Sequence[str],
    recipes: Sequence[str | Path],
    changes: dict[str, Any] | None,
    trusted: bool,
) -> list[_Trial]:
    """All recipes at all sizes, with what can be known of them checked."""
    if not sizes:
        raise BudgetError("no size is named; give some, such as --sizes 6MB,4.8MB or --sizes 60%,40%")
    if not recipes:
        raise RecipeError("no recipe is named; give some, such as --recipes spectrim,svd")
    budgets = [read_size(size) for size in sizes]
    check_once([budget.label for budget in budgets], "the size")
    check_once([Recipe.read(recipe).name for recipe in recipes], "the recipe")
    check_directories([Path(source)])
    if is_compressed(Path(source)):
        raise UsageError(f"{source} is compressed already; name the dense model")
    check_directory(out, "-o")
    check_file(out / RESULTS, "-o")
    opened = stats if isinstance(stats, Statistics) else Statistics.open(stats)
    trials = []
    for recipe in recipes:
        for budget in budgets:
            job = check_job(
                source,
                None,
                recipe=recipe,
                changes=changes,
                budgets=[budget],
                plan=None,
                stats=opened,
                overwrite=False,
                samples={},
                trust_remote_code=trusted,
            )
            trials.append(_Trial(job, out.absolute() / f"{job.recipe.name}-{budget.label}"))
    return trials


def _checked_source(out: Path, trials: Sequence[_Trial]) -> dict[str, Any]:
    """Of which model and samples the checkpoints are; CheckpointError where some are there that are of others."""
    statistics = trials[0].job.statistics
    assert statistics is not None
    manifest = statistics.manifest
    model = hashlib.sha256(manifest.model.model_dump_json().encode()).hexdigest()
    settings = manifest.settings.model_dump(mode="json")
    mine = {"model": model, "samples": manifest.data.fingerprint, "calibration": settings}
    kept = [trial.target for trial in trials if trial.finished()]
    try:
        there = read_object(out / _SOURCE) if kept else mine
    except ValueError:
        there = {}
    if there != mine:
        raise CheckpointError(
            f"{kept[0]} is of another model or of other statistics; remove it, or name another directory by -o"
        )
    return mine


def _compress(
    source: str,
    trials: Sequence[_Trial],
    progress: Progress | None,
    *,
    device: str | None,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
) -> dict[Path, str]:
    """Make the checkpoints that are not there; why there can be none, by their place, of those that cannot be made."""
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    missing = [trial for trial in trials if not trial.finished()]
    reasons: dict[Path, str] = {}
    if not missing:
        return reasons
    model, processor = load(source, device_map=device, dtype=dtype, **where), load_processor(source, **where)
    done = 0
    for recipe in dict.fromkeys(trial.job.recipe.model_dump_json() for trial in missing):
        own = [trial for trial in missing if trial.job.recipe.model_dump_json() == recipe]
        job = own[0].job
        with compression(model, job.recipe, stats=job.statistics, processor=processor, progress=progress) as prepared:
            for trial in own:
                try:
                    plan = prepared.planned(trial.budget)
                except BudgetError as error:
                    reasons[trial.target] = str(error)
                else:  # a processor that is saved by transformers brings its code; a directory's is copied without
                    prepared.save(plan, trial.target, processor=processor if trust_remote_code else source)
                done += 1
                if progress is not None:
                    progress("checkpoints", done, len(missing))
    return reasons
