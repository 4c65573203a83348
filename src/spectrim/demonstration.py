"""The main job of `spectrim demo`: calibrate once, compress by several recipes, evaluate, and compare answers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from spectrim.calibrate import calibrate
from spectrim.calibrate.snapshot import check_home
from spectrim.checkpoint import check_target, load, load_processor
from spectrim.checks import check_device, check_directory, check_file
from spectrim.demo import resolve
from spectrim.evaluate import EvaluationReport, evaluate, load_questions
from spectrim.pipeline import compression
from spectrim.settings import EvaluationOptions

RECIPES = ("spectrim", "laser", "jw-svd", "svd-llm", "asvd", "fwsvd", "svd")
BUDGETS = (0.4, 0.3)
SAMPLES, SEQLEN = 192, 128


@dataclass(frozen=True)
class Demonstration:
    """What the demo has made, and how long it took in seconds."""

    report: EvaluationReport
    answers: Table
    checkpoints: tuple[Path, ...]
    statistics: Path
    results: Path
    seconds: float


def show(
    out: Path,
    *,
    samples: int,
    progress: Callable[[str, int, int], None],
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Demonstration:
    """Run the demo into `out`; `samples` questions of each task are asked of every model.

    `device` and `dtype` are where and in what models run; None: as the loader and :func:`evaluate` choose, in float32
    where answers are compared.

    What an earlier run left there is replaced, or gone on from; nothing else is touched. Raises SpectrimError where
    something else is in the way.
    """
    started = time.perf_counter()
    targets = {(recipe, retain): out / f"{recipe}-{retain:.0%}" for recipe in RECIPES for retain in BUDGETS}
    EvaluationOptions.checked(samples=samples)
    check_device(device)
    check_directory(out, "-o")
    check_home(out / "statistics")
    check_file(out / "results.json", "-o")
    for target in targets.values():
        check_target(target, overwrite=True)
    source = resolve("demo")
    model, processor = load(source, device_map=device, dtype=dtype), load_processor(source)
    statistics = calibrate(
        model,
        out / "statistics",
        processor=processor,
        samples=SAMPLES,
        seqlen=SEQLEN,
        batch_size=32,
        gradients=True,
        curvature=True,
        progress=lambda done, total: progress("calibrate", done, total),
    )
    checkpoints = []
    for recipe in RECIPES:
        with compression(model, recipe, stats=statistics, processor=processor, progress=progress) as prepared:
            for retain in BUDGETS:
                target = targets[recipe, retain]
                checkpoints.append(prepared.save(prepared.plan(retain), target, processor=source, overwrite=True))
    checkpoints.sort(key=lambda path: -float(path.name.rpartition("-")[2].rstrip("%")))
    report = evaluate(
        [source, *checkpoints],
        samples=samples,
        seqlen=256,
        max_tokens=8192,
        batch_size=40,
        device=device,
        dtype=dtype or torch.float32,
        progress=progress,
    )
    report.write(out / "results.json")
    return Demonstration(
        report,
        _answers(report, samples),
        tuple(checkpoints),
        out / "statistics",
        out / "results.json",
        time.perf_counter() - started,
    )


def _answers(report: EvaluationReport, samples: int) -> Table:
    """One question of each task: what the dense model says, and what the recipes at the smallest budget say."""
    shown = [r for r in report.results if not r.compressed or r.directory.endswith(f"-{min(BUDGETS):.0%}")]
    shown = [r for r in shown if Path(r.directory).name.rpartition("-")[0] in ("", "spectrim", "jw-svd", "svd-llm")]
    grid = Table(title="Sample answers", box=None, pad_edge=False)
    for heading in ("task", "question", "right", *(Path(r.directory).name for r in shown)):
        grid.add_column(heading)
    questions = load_questions("builtin", samples, 0)
    for index in range(0, len(questions), samples):
        asked = questions[index]
        grid.add_row(asked.task, asked.question, asked.answer, *(r.answers[index].given for r in shown))
    return grid
