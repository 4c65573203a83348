"""The main job of `spectrim demo`: calibrate once, compress by several recipes, measure, and show it on one page."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from spectrim.bench import Attempt, Frontier, bench
from spectrim.bench.frontier import Point, last_part
from spectrim.calibrate import calibrate
from spectrim.calibrate.snapshot import check_home
from spectrim.checkpoint import check_target, load, load_processor
from spectrim.checks import check_device, check_directory, check_file
from spectrim.demo import resolve
from spectrim.errors import ReportError
from spectrim.evaluate import evaluate
from spectrim.pipeline import compression
from spectrim.report.reading import read
from spectrim.report.writing import check_packages, check_page, write_page
from spectrim.settings import EvaluationOptions

RECIPES = ("spectrim", "laser", "jw-svd", "svd-llm", "asvd", "fwsvd", "svd")
BUDGETS = (0.4, 0.3)
SAMPLES, SEQLEN, REPEATS = 192, 128, 3


KEPT = 0.9  # of accuracy, or of one over perplexity: what keeps less is named
BLIND, OURS = "svd-llm", "spectrim"  # whitens by text alone, and sees


@dataclass(frozen=True)
class Demonstration:
    """What the demo has made, and how long it took in seconds.

    `page` is None where the packages that draw it are not installed; `hint` then says how to get it.
    """

    frontier: Frontier
    checkpoints: tuple[Path, ...]
    statistics: Path
    results: Path
    page: Path | None
    hint: str | None
    seconds: float

    def table(self) -> Table:
        """Each model's size, accuracy kept, perplexity and speed; of each size that first which keeps most of both."""
        grid = Table(title="What is kept at which size", box=None, pad_edge=False)
        for heading in ("model", "size, MB", "accuracy kept, %", "perplexity", "speed, ×", "loses"):
            side = "left" if heading in ("model", "loses") else "right"
            grid.add_column(heading, justify=side, no_wrap=True)  # type: ignore[arg-type]
        dense, *others = self.frontier.points()
        for point in (dense, *sorted(others, key=lambda point: (-_share(point.name), -min(_kept(point, dense))))):
            values = f"{point.bytes / 1e6:.1f}", f"{100 * _kept(point, dense)[0]:.0f}", f"{point.perplexity:.1f}"
            grid.add_row(point.name, *values, f"{point.speed or 0:.2f}", _losses(point, dense))
        return grid

    def lesson(self) -> str:
        """What the table shows, in a sentence or two."""
        points = {point.name: point for point in self.frontier.points()}
        dense = self.frontier.points()[0]
        said = []
        for recipe, how in ((BLIND, "by text alone"), (OURS, "by text and images")):
            point = points[f"{recipe}-{min(BUDGETS):.0%}"]
            said.append(
                f"calibrated {how}, {point.name} keeps {_kept(point, dense)[0]:.0%} of the answers about images "
                f"(perplexity {point.perplexity:.1f})"
            )
        return f"{said[0][0].upper()}{'; '.join(said)[1:]}. Dense: {dense.perplexity:.1f}."


def _share(name: str) -> float:
    """Of which the linears' bytes are kept, in per cent, by the name of a checkpoint."""
    return float(name.rpartition("-")[2].rstrip("%"))


def _kept(point: Point, dense: Point) -> tuple[float, float]:
    """Of accuracy and of language (one over perplexity), the shares of the dense model's."""
    assert dense.perplexity is not None
    assert point.perplexity is not None
    return point.kept or 0.0, dense.perplexity / point.perplexity


def _losses(point: Point, dense: Point) -> str:
    sight, language = _kept(point, dense)
    return " and ".join(word for word, kept in (("sight", sight), ("language", language)) if kept < KEPT)


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
    check_device(device)
    check(out, samples)
    targets, hint = _targets(out), None
    try:
        check_packages()
        check_page(out / "report.html")
    except ReportError as error:
        hint = str(error)
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
    checkpoints.sort(key=lambda path: -_share(path.name))
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
    names = [source, *map(str, checkpoints)]
    given: dict[str, Any] = {"device": device, "dtype": dtype, "progress": progress}
    timed = bench(names, names=list(map(last_part, names)), repeats=REPEATS, **given)
    attempts = [Attempt(recipe, f"retain-{retain}", str(target), None) for (recipe, retain), target in targets.items()]
    frontier = Frontier(report, timed, tuple(attempts))
    frontier.write(out / "results.json")
    page = None
    if hint is None:
        page = out / "report.html"
        write_page(read([out / "results.json"]), page)
    return Demonstration(
        frontier,
        tuple(checkpoints),
        out / "statistics",
        out / "results.json",
        page,
        hint,
        time.perf_counter() - started,
    )


def check(out: Path, samples: int) -> tuple[Path, ...]:
    """The checkpoints that the demo would write. Raises SpectrimError where something else is in the way."""
    targets = tuple(_targets(out).values())
    EvaluationOptions.checked(samples=samples)
    check_directory(out, "-o")
    check_home(out / "statistics")
    check_file(out / "results.json", "-o")
    for target in targets:
        check_target(target, overwrite=True)
    return targets


def _targets(out: Path) -> dict[tuple[str, float], Path]:
    """The checkpoints by recipe and budget."""
    return {(recipe, retain): out / f"{recipe}-{retain:.0%}" for recipe in RECIPES for retain in BUDGETS}
