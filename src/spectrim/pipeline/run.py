"""The entry points: from a model and a recipe to statistics, spectra, plans and checkpoints."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy, anatomy
from spectrim.away import is_away
from spectrim.calibrate import Statistics, calibrate
from spectrim.calibrate.memory import limit_bytes
from spectrim.calibrate.probe import forget_peak, held_memory, peak_memory, written_bytes
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.dense import check_dense
from spectrim.disk.scratch import scratch
from spectrim.errors import BudgetError, RecipeError, UsageError
from spectrim.estimate import Cost, Estimate
from spectrim.metrics.spectra import cache_key, make_spectra
from spectrim.pipeline.budget import Budget
from spectrim.pipeline.context import Context
from spectrim.pipeline.jobs import Job, check_job, check_samples, gathered, with_effort, with_patterns
from spectrim.pipeline.stages import Compression, Progress
from spectrim.plan.maker import solving
from spectrim.plan.plan import Plan
from spectrim.recipe import Recipe
from spectrim.settings import EFFORT, REPLACED, CalibrationOptions
from spectrim.storage import stored_layers

_log = logging.getLogger(__name__)

Foresee = Callable[[PreTrainedModel, Anatomy, Statistics | None, Any, Path], Estimate]
"""What a compression will take, of the model, its parts, statistics and processor, and the directory of its spectra."""


@contextmanager
def compression(
    model: PreTrainedModel,
    recipe: str | Path | Recipe = "spectrim",
    *,
    stats: str | Path | Statistics | None = None,
    processor: Any = None,
    changes: dict[str, Any] | None = None,
    progress: Progress | None = None,
    keep: str | Path | None = None,
    check: Callable[[PreTrainedModel, Anatomy], None] | None = None,
    foresee: Foresee | None = None,
    **calibration: Any,
) -> Iterator[Compression]:
    """Prepare a dense model for compression: statistics (opened, or gathered if the recipe needs them) and spectra.

    Statistics that are gathered now, and spectra beside them, stay in the directory `keep`, from where a run that was
    killed goes on; without one they are in a temporary directory while the block runs. `check` gets the model and its
    parts before samples run through it, and raises where they do not fit what is to come. With `foresee`, what is to
    come is estimated from a probe of a few seconds, logged, compared at the end with what it took, and kept in the
    record. `calibration` are arguments of :func:`spectrim.calibrate`, such as text, images, samples and seed.

    Raises:
        SpectrimError: of the kind that says which input is at fault.
    """
    _check_names(calibration)
    memory = CalibrationOptions.checked(memory=calibration.get("memory")).memory
    chosen = Recipe.read(recipe, changes)
    statistics = stats if stats is None or isinstance(stats, Statistics) else Statistics.open(stats)
    check_samples(chosen, statistics, calibration)
    if stored_layers(model):
        raise RecipeError("the model is compressed already; start from the dense model, or dequantize it first")
    check_dense(model)
    if chosen.tune.epochs and is_away(model):
        raise UsageError(
            "the end-to-end pass trains the whole model in memory, and parts of this one stay in its files; raise "
            "--memory, or set tune.epochs=0"
        )
    parts = anatomy(model)
    for skipped in parts.left_out():
        _log.warning("compress: stays dense: %s of all parameters", skipped)
    if check is not None:
        check(model, parts)
    forms = calibration.get("curvature_forms", {}) if statistics is None else statistics.manifest.forms
    _check_room(model, parts, chosen, forms, memory)

    def report(stage: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(stage, done, total)

    with nullcontext(Path(keep)) if keep is not None else scratch() as folder:
        if statistics is not None:
            statistics.check_model(model)
        elif chosen.needs_statistics:
            if processor is None:
                raise RecipeError(f"recipe '{chosen.name}' needs samples; give statistics, or the model's processor")
            options = gathered(chosen, calibration)
            home = folder if keep is not None else folder / "statistics"
            options["estimate"] = foresee is not None
            statistics = calibrate(model, home, processor=processor, progress=report("calibrate"), **options)
        home = (folder if statistics is None else statistics.path) / "spectra"
        home = home / cache_key(chosen.metric, statistics, parts)
        cost = None
        if foresee is not None:
            found = foresee(model, parts, statistics, processor, home)
            disk = partial(written_bytes, home.parent.parent)
            forget_peak(model.device)  # of calibration, and of the probe
            cost = Cost(found, time.monotonic, partial(peak_memory, model.device), disk)
            _log.info("compress: will take about %s", found)
        spectra = make_spectra(model, parts, chosen.metric, statistics, home, report("decompose"))
        prepared = Compression(model, chosen, statistics, spectra, parts, processor, progress, cost, memory)
        yield prepared
        if cost is not None:
            _log.info("compress: took %s; estimated were %s", cost.so_far(prepared.written), cost.estimate)


def _check_room(
    model: PreTrainedModel, parts: Anatomy, recipe: Recipe, forms: Mapping[str, str], memory: str | None
) -> None:
    """Log a linear whose own steps take more memory than there is, or than was allowed: nothing bounds them.

    `forms` are those of output moments that are not full, by name or role of linears.
    """
    changed = [linear for linear in parts.linears if recipe.allocation.reason(linear) is None]
    taken = {x.name: solving(x, recipe, forms.get(x.name, forms.get(x.role, "full"))) for x in changed}
    name = max(taken, key=taken.__getitem__, default="")
    room = limit_bytes(memory, model.device) - held_memory(model.device)
    if name and taken[name] > room:
        out, size = parts.linear(name).out_features, parts.linear(name).in_features
        allowed = f"--memory {memory} leaves" if memory is not None else "the machine has"
        _log.warning(
            "compress: the steps of %s (%d × %d) take about %.1f GiB at once, and %s %.1f GiB; they are not divided: "
            "allow more memory, or keep such linears dense with --keep",
            name, out, size, taken[name] / 2**30, allowed, max(0, room) / 2**30,
        )  # fmt: skip


def job_compression(
    job: Job,
    model: PreTrainedModel,
    processor: Any,
    progress: Progress | None,
    calibration: Mapping[str, Any],
    *,
    estimate: bool = False,
) -> AbstractContextManager[Compression]:
    """:func:`compression` of what was asked for; with an `estimate` of what it will take, if asked."""

    def foresee(
        model: PreTrainedModel, parts: Anatomy, statistics: Statistics | None, processor: Any, spectra: Path
    ) -> Estimate:
        from spectrim.pipeline import probe

        return probe.foresee(model, parts, job, statistics, processor, spectra, calibration.get("memory"))

    return compression(
        model,
        job.recipe,
        stats=job.statistics,
        processor=processor,
        progress=progress,
        keep=job.kept,
        check=job.check_parts,
        foresee=foresee if estimate else None,
        **{name: value for name, value in calibration.items() if job.statistics is None or name == "memory"},
    )


def limits(
    retain: float | None, bits: float | None, size: str | int | None, context: int | None, batch: int
) -> list[Budget]:
    """The one limit of a call, none where it has none. Raises BudgetError."""
    if batch != 1 and context is None:
        raise BudgetError("a batch is one of sequences in a cache; give --context beside --batch, or leave out --batch")
    cached = None if context is None else Context(context, batch)
    return [] if retain is bits is size is None and cached is None else [Budget(retain, bits, size, cached)]


def _check_names(calibration: Mapping[str, Any]) -> None:
    if unknown := sorted(calibration.keys() - CalibrationOptions.model_fields.keys()):
        instead = REPLACED.get(unknown[0])
        remedy = "" if instead is None else f"; {instead} takes its place"
        raise TypeError(f"calibrate() has no argument '{unknown[0]}'{remedy}")


def compress(
    model: str | Path | PreTrainedModel,
    out: str | Path | None = None,
    *,
    recipe: str | Path | Recipe = "spectrim",
    retain: float | None = None,
    bits: float | None = None,
    size: str | int | None = None,
    context: int | None = None,
    batch: int = 1,
    plan: str | Path | Plan | None = None,
    stats: str | Path | Statistics | None = None,
    processor: Any = None,
    changes: dict[str, Any] | None = None,
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
    effort: str = EFFORT,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **calibration: Any,
) -> PreTrainedModel:
    """Compress a model to a byte budget, or as a plan says; returns the factored model, written to `out` if given.

    Args:
        model: a directory, a hub id, "demo", or a loaded dense model, which is then factored in place.
        out: the checkpoint directory; None writes none. Statistics that are gathered stay beside it in ``OUT.stats``,
            from where the same call goes on after it was killed.
        recipe: a built-in name, a YAML file or a Recipe; `changes` sets single values by dotted key.
        retain: share of the linears' bytes to keep, in (0, 1].
        bits: in place of it, bits per weight of the linears.
        size: in place of it, the most that all safetensors files may take, everything counted, such as "3.5GB". Where
            the recipe has no integers, they are allowed (``quantize.bits: auto``); set it to None to keep to ranks.
        context, batch: tokens of each of so many sequences, whose key/value cache the size is to hold as well; ranks of
            keys and values by head (recipe ``laser``) are then bought against it.
        plan: what to obey in place of an allocation; a plan.json or a Plan.
        stats: a statistics directory; without one, samples are gathered now if the recipe needs them.
        processor: the processor or tokenizer of a loaded model, or the directory that has it; needed to gather samples
            and to make `out` complete. Found by itself where `model` is a name.
        keep, only: patterns of names of linears that stay dense, or that alone are compressed, such as "*.layers.0.*".
        effort: "quick", "standard" or "thorough": samples, compensation and end-to-end pass where nothing else says it.
        trust_remote_code: run code that the model brings; it is written into `out`, too.
        calibration: arguments of :func:`spectrim.calibrate`, such as text, images, samples and seed.

    Raises:
        SpectrimError: of the kind that says which input is at fault.
    """
    _check_names(calibration)
    changes = with_patterns(changes, keep, only)
    changes, calibration = with_effort(effort, recipe, changes, calibration, gathers=stats is None)
    source = None if isinstance(model, PreTrainedModel) else resolve(model)
    job = check_job(
        model if isinstance(model, PreTrainedModel) else str(source),
        out,
        recipe=recipe,
        changes=changes,
        budgets=limits(retain, bits, size, context, batch),
        plan=plan,
        stats=stats,
        overwrite=overwrite,
        samples=calibration,
        trust_remote_code=trust_remote_code,
    )
    limit: dict[str, Any] = {"memory": calibration.get("memory"), "trust_remote_code": trust_remote_code}
    loaded = model if isinstance(model, PreTrainedModel) else load(str(source), **limit)
    files = source or processor  # what a checkpoint copies: the directory where there is one
    if isinstance(found := processor or source, str | Path):
        processor = load_processor(found, trust_remote_code=trust_remote_code)
    if trust_remote_code:
        files = processor  # which, saved by transformers, brings its code
    with job_compression(job, loaded, processor, progress, calibration) as prepared:
        (chosen,) = prepared.plans(job)
        if not job.targets:
            return prepared.apply(chosen)
        prepared.save(chosen, job.targets[0], processor=files, overwrite=overwrite, keep=True)
        return loaded
