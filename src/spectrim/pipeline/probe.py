"""What a compression will take on this machine: a few linears and one batch of each modality are tried and timed."""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.away import values
from spectrim.calibrate import Statistics
from spectrim.calibrate.data import Data, source_data
from spectrim.calibrate.memory import limit_bytes
from spectrim.calibrate.passes import forward_options, model_inputs, prepared
from spectrim.calibrate.probe import forget_peak, held_memory, peak_memory
from spectrim.errors import SpectrimError
from spectrim.estimate import Checkpoints, Estimate, Rates, by_work, compression, work
from spectrim.linear import Linear
from spectrim.maths.closed_form import anchored_weight, correction
from spectrim.maths.decompose import decompose
from spectrim.metrics.metric import chosen, layer_metric, positions_behind
from spectrim.pipeline.budget import Sizes
from spectrim.pipeline.jobs import Job
from spectrim.plan.maker import solving
from spectrim.plan.options import Menu, menu
from spectrim.recipe import Recipe
from spectrim.storage import Problem, made
from spectrim.tune.pace import pace

_HELD = 14  # times the outputs of a block's linears: what walks hold of every sample, measured on two models
_TRAINED = 32  # bytes of a number that is trained: itself, first and best state, master and mean, gradient, Adam's two
_TUNED = 8  # samples of each modality that the end-to-end pass is timed by: drawn answers differ in length
_SECONDS = 4.0  # of linears that are tried; larger ones are then put in proportion

Kind = tuple[int, int, int, bool]
"""Outputs, inputs, parts that are factored apart, and whether it may be integers: linears that take equally long."""


def foresee(
    model: PreTrainedModel,
    parts: Anatomy,
    job: Job,
    statistics: Statistics | None,
    processor: Any,
    spectra: Path,
    memory: str | None = None,
) -> Estimate:
    """What is left of a compression whose statistics are there, if any.

    Args:
        model: dense.
        parts: of it.
        job: what was asked for.
        statistics: that it uses.
        processor: of the model.
        spectra: the directory that has the spectra of earlier runs.
        memory: the limit of `calibrate`; what a walk cannot keep in it waits on disk.
    """
    recipe, sizes = job.recipe, Sizes(model, parts)
    if job.plan is None:
        most = [max(1, budget.linear_bytes(sizes)) for budget in job.budgets]
    else:
        most = [job.fitted_plan(parts).bytes]
    forget_peak(model.device)
    before = held_memory(model.device)
    first: dict[Kind, Linear] = {}
    for linear in parts.linears:
        first.setdefault(_kind(recipe, linear), linear)
    measured: dict[Kind, Rates] = {}
    began, share = time.monotonic(), sum(most) / len(most) / sizes.linears
    with torch.no_grad():
        for kind, linear in sorted(first.items(), key=lambda item: work(item[0][:2])):
            if measured and time.monotonic() - began > _SECONDS:
                break
            if not measured:
                _try(model, linear, recipe, statistics, share)  # libraries begin slowly
            measured[kind] = _try(model, linear, recipe, statistics, share)
    compensates = recipe.compensate.kind != "none"
    walk, kept = 0.0, 0
    if compensates:
        walk, kept = _walk(model, parts, recipe, statistics, processor)
        kept = min(kept, max(0, limit_bytes(memory, model.device) - before))
    trained = 0.0
    if recipe.tune.epochs:
        trained = _tuning(model, parts, recipe, statistics, processor)
    fresh = [linear for linear in parts.linears if not (spectra / f"{linear.name}.safetensors").exists()]
    changed = [linear for linear in parts.linears if recipe.allocation.reason(linear) is None]
    done = Checkpoints(
        decompose=Counter(_kind(recipe, linear) for linear in fresh),
        make=Counter(_kind(recipe, linear) for linear in changed),
        spectra={kind: _spectrum_bytes(recipe, kind) for kind in first},
        targets=len(most),
        bytes=sum(most) + len(most) * sizes.fixed,
        kept=sum(most) if compensates else 0,
        compensates=compensates,
    )
    rates = by_work(measured, {kind: kind[:2] for kind in first})
    tried = max(0, peak_memory(model.device) - before)
    forms = {} if statistics is None else statistics.manifest.forms
    untried = [solving(x, recipe, forms.get(x.name, "full")) for x in changed if _kind(recipe, x) not in measured]
    peak = max(tried, *untried, kept + sizes.fixed + max(most))
    if recipe.tune.epochs:
        peak = max(peak, _TRAINED * max(most) // model.dtype.itemsize)
    return compression(done, rates, walk=walk, tune=trained, held=before, work=peak)


def _kind(recipe: Recipe, linear: Linear) -> Kind:
    heads = linear.per_head or 1 if recipe.metric.per_head else 1
    return linear.out_features, linear.in_features, heads, recipe.quantize.takes(linear.role)


def _spectrum_bytes(recipe: Recipe, kind: Kind) -> int:
    """Of a spectrum in its file: directions of the smaller side of the weight, or of each part (see ``Spectrum``)."""
    out, size, heads, _ = kind
    sides = 2 if recipe.metric.kind == "curvature" else 1
    if heads > 1:
        return sides * 4 * out * min(out // heads, size)
    return sides * (8 * size**2 if out > size else 4 * out**2)


def _try(model: PreTrainedModel, linear: Linear, recipe: Recipe, statistics: Statistics | None, share: float) -> Rates:
    """Seconds of one linear, whose results are thrown away."""
    W = values(model.get_submodule(linear.name))
    began = time.perf_counter()
    metric = layer_metric(recipe.metric, linear, statistics, W.device)
    heads = _kind(recipe, linear)[2]
    spectrum = decompose(W, metric.value, metric.output, heads)
    decomposed = time.perf_counter()
    problem = Problem(
        linear,
        lambda: W,
        lambda: (metric.value, metric.output),
        recipe.stored,
        recipe.quantize,
        heads=heads,
        kept=spectrum,
        positions=positions_behind(recipe.metric, linear, statistics),
    )
    options = menu(problem)
    listed = time.perf_counter()
    if recipe.compensate.kind != "none":
        C = layer_metric(recipe.metric, linear, statistics, W.device).value
        if C is not None and C.ndim == 2:
            cross, damping = W.to(C) @ C, recipe.compensate.damping
            if recipe.compensate.weight == "auto":
                correction(W, C, cross, C, damping)
            target = anchored_weight(W, C, cross, damping)
            problem = replace(problem, weight=lambda: target, kept=None)
    made(problem, *_bought(options, share))
    return Rates(decomposed - began, listed - decomposed, time.perf_counter() - listed)


def _bought(options: Menu, share: float) -> tuple[str, Any]:
    """Form and spec of the option that loses least in this share of the dense bytes, else of the smallest."""
    fitting = (options.bytes <= share * options.linear.nbytes).nonzero()[0]
    number = fitting[options.error[fitting].argmin()] if len(fitting) else options.bytes.argmin()
    return options.option(int(number))


def _walk(
    model: PreTrainedModel, parts: Anatomy, recipe: Recipe, statistics: Statistics | None, processor: Any
) -> tuple[float, int]:
    """Seconds of one forward pass of the samples of compensation, and bytes that it keeps of them.

    Both are zero where there are no samples any more, which the compression itself will say.
    """
    if statistics is None:
        return 0.0, 0
    settings = statistics.manifest.settings
    size, number = min(settings.batch_size, settings.samples), settings.samples
    if recipe.compensate.samples is not None:
        number = min(number, recipe.compensate.samples)
    if (data := _some(model, parts, statistics, processor, size)) is None:
        return 0.0, 0
    blocks = Counter[str | None]()
    for linear in parts.linears:
        blocks[linear.block] += linear.out_features
    seconds, kept = 0.0, 0
    with prepared(model), torch.no_grad():
        for modality in chosen(recipe.metric, {modality: modality for modality in data.samples}):
            batch = next(data.batches(modality, size))
            inputs, began = model_inputs(model, batch), 0.0
            for _ in range(2):  # the first warms up
                began = time.perf_counter()
                model(**inputs, **forward_options(model))
            seconds += (time.perf_counter() - began) * number / batch.samples
            kept += _HELD * number * inputs["input_ids"].shape[1] * max(blocks.values()) * model.dtype.itemsize
    return seconds, kept


def _tuning(
    model: PreTrainedModel, parts: Anatomy, recipe: Recipe, statistics: Statistics | None, processor: Any
) -> float:
    """Seconds of the end-to-end pass; zero as `_walk`."""
    if statistics is None:
        return 0.0
    settings, tune = statistics.manifest.settings, recipe.tune
    if (data := _some(model, parts, statistics, processor, min(_TUNED, settings.samples))) is None:
        return 0.0
    given: dict[str, Any] = {"answer_tokens": settings.answer_tokens, "seed": settings.seed}
    paces = [pace(model, parts, data, modality, **given) for modality in data.samples]
    number = min(settings.samples, tune.samples or settings.samples)
    passes = tune.epochs * 9 / 8  # an eighth is measured four times, in half the time, in place of being trained on
    return number * sum(gather + passes * step for gather, step in paces)


def _some(model: PreTrainedModel, parts: Anatomy, statistics: Statistics, processor: Any, size: int) -> Data | None:
    """`size` samples of each modality of the statistics, if they are there still."""
    if processor is None:
        return None
    try:
        return source_data(model, processor, statistics, sees=parts.tower is not None, samples=size)
    except SpectrimError:
        return None
