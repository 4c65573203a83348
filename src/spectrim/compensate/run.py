"""Both models, dense and compressed, walked block by block over the calibration samples."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.away import values
from spectrim.calibrate import Statistics
from spectrim.calibrate.data import reload_data
from spectrim.calibrate.memory import limit_bytes
from spectrim.calibrate.passes import forward_options, model_inputs, prepared
from spectrim.calibrate.positions import positions
from spectrim.calibrate.probe import held_memory
from spectrim.compensate.batches import Pair, dense_taps, rows
from spectrim.compensate.refine import refine, refined
from spectrim.compensate.shares import Fit, naming, shares
from spectrim.compensate.store import Store
from spectrim.compensate.streams import Pass, stopping_at
from spectrim.compensate.units import Group, Unit
from spectrim.disk.lock import writing
from spectrim.disk.overflow import Overflow
from spectrim.errors import ModelError, RecipeError
from spectrim.maths.closed_form import ShiftedSum, anchored_weight, blended
from spectrim.maths.decompose import OutputMetric
from spectrim.maths.roots import wide
from spectrim.metrics.metric import chosen, joint_weights, layer_metric, positions_behind
from spectrim.plan.maker import Maker, solving
from spectrim.plan.plan import Plan
from spectrim.recipe import MetricPart, Recipe
from spectrim.samples import Modality
from spectrim.storage import Problem, Tensors, form, made

_log = logging.getLogger(__name__)

_HELD = 2**30  # bytes that outputs of a dense unit may take; where they are more, it runs again for each group


def check_kinds(recipe: Recipe, plan: Plan) -> None:
    """Raises RecipeError where the recipe's kind of compensation has no way to fit what a plan stores."""
    kinds = {plan.linears[name].form for name in plan.changed}
    if recipe.compensate.kind == "adacomp" and (others := sorted(x for x in kinds if not form(x).alternates)):
        raise RecipeError(
            f"adaComp fits float factors, and the form '{others[0]}' has none; set compensate.kind=anchored or none"
        )


class Compensation:
    """Compensation of one model under one recipe, anchored or by adaComp (docs/methods.md, section 7).

    `maker` makes linears without compensation. `memory` is the limit of `calibrate`: what flows between the blocks
    waits on disk where it does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Anatomy,
        recipe: Recipe,
        plan: Plan,
        maker: Maker,
        statistics: Statistics,
        processor: Any,
        memory: str | None = None,
    ) -> None:
        self._memory = memory
        self._model, self._parts, self._recipe, self._plan = model, parts, recipe, plan
        self._maker, self._statistics, self._processor = maker, statistics, processor
        check_kinds(recipe, plan)
        self._own_kind: Literal["curvature", "whitening"] = (
            "curvature" if recipe.metric.kind == "curvature" else "whitening"
        )
        self._store = Store(statistics, parts, recipe, plan)
        names: dict[str, list[Any]] = {}
        for linear in parts.linears:
            if linear.name in plan.changed:
                names.setdefault(linear.block or linear.name, []).append(linear)
        self._units = {name: Unit(model, name, linears) for name, linears in names.items()}

    @torch.no_grad()
    def solve(self, progress: Callable[[int, int], None] | None = None) -> Mapping[str, Tensors]:
        """All linears of the plan that samples reach, by name; the model is dense before and after.

        The calibration samples run through both models at once and stop before every unit. Linears of a unit that read
        one input are solved together, in the order in which the unit runs them, each with those before it compressed.
        Units that an earlier run has left on disk are not solved again, and what is solved stays there until it is
        asked for.

        Raises:
            RecipeError: no sample is of a modality that the recipe's metric counts.
            SampleError: the calibration samples cannot be loaded any more.
            StatisticsError: they are other samples now, or what is solved cannot be written or read.
            ModelError: the compressed model takes another path than the dense one.
            NumericalError: NaN or infinity; names the linear.
        """
        missing = {name for name in self._units if not self._store.has(name)}
        total, kept = len(self._units), len(self._units) - len(missing)
        if not missing:
            _log.info("compensate: complete already")
            return self._store.solved(self._units)
        if kept:
            _log.info("compensate: resuming after block %d of %d", kept, total)
        if progress is not None:
            progress(kept, total)
        with writing(self._store.home, alone=False):
            with prepared(self._model), self._passes() as pairs:
                for _ in self._walk(pairs, missing):
                    if progress is not None:
                        progress(total - len(missing), total)
            for name in missing:  # no sample comes there, which the next call need not find out again
                self._store.write(name, {})
        return self._store.solved(self._units)

    def _walk(self, pairs: list[Pair], missing: set[str]) -> Iterator[None]:
        """Solve the missing units one after the other; yields after each, and ends after the last that samples reach.

        The compressed layers of one unit are in memory at a time.
        """
        while going := [pair for pair in pairs if pair.dense.unit is not None or pair.small.unit is not None]:
            # Images come first and pass through all that text passes through: text waits where it is.
            name = going[0].dense.unit
            here = [pair for pair in going if pair.dense.unit == name]
            if name is None or any(pair.small.unit != name for pair in here):
                raise ModelError(
                    f"the compressed model does not run through the same layers as the dense one (at {name}); "
                    "set compensate.kind=none"
                )
            unit = self._units[name]
            outputs: list[Any] = []
            if name in missing:
                solved, outputs = self._solve(unit, here)
                self._store.write(name, solved)
                missing.discard(name)
                yield
            else:
                unit.compress(self._plan, self._store.read(name))
            if not missing:
                return
            for number, pair in enumerate(here):
                call = pair.dense.wake()
                pair.dense.answer(outputs[number] if outputs else unit.run(call, small=False))
                if outputs:
                    outputs[number] = None
                call = pair.small.wake()
                pair.small.answer(unit.run(call, small=True))
                del call
            unit.small.clear()

    def _solve(self, unit: Unit, here: list[Pair]) -> tuple[dict[str, Tensors], list[Any]]:
        """The unit's linears, and what the dense unit gives for each batch; nothing of it where it was not kept."""
        firsts = {pair.modality: pair.dense for pair in reversed(here)}
        found: dict[str, Tensors] = {}
        last: str | None = None  # of those whose output is added to the residual stream
        with ExitStack() as stack:
            calls = [stack.enter_context(one.awake()) for one in firsts.values()]
            groups = unit.groups(calls, residual=self._recipe.compensate.residual)
        writers = frozenset[str]().union(*(group.writers for group in groups))
        dense, how = dense_taps(unit, here, writers, self._room), self._recipe.compensate
        averaged = how.buckets is not None
        for group in groups:
            last = max(group.writers, default=last)
            sums: dict[Modality, ShiftedSum] = {}
            for modality, x, targets in rows(unit, group, here, dense, left_out=False, averaged=averaged):
                if modality not in sums:
                    sums[modality] = ShiftedSum.zero(x.shape[-1])
                sums[modality].add(x, targets)
            fits = self._fits(unit, group, sums)
            if how.weight == "auto":
                judges = rows(unit, group, here, dense, left_out=True, averaged=averaged)
                weights = shares(fits, judges, how.damping)
            else:
                weights = dict.fromkeys(fits, how.weight)
            # Each fit is let go of as soon as it is used: its moments may be gigabytes.
            solved = {name: self._linear(unit, name, fits.pop(name), weights[name]) for name in [*fits]}
            solved = solved or {name: self._alone(name) for name in group.members}
            unit.compress(self._plan, solved)
            found |= solved
        outputs = [seen.output for seen in dense]
        dense.clear()
        rest = {name: self._alone(name) for name in unit.dense if name not in found}
        unit.compress(self._plan, rest)
        found |= rest
        if (steps := how.refine) and unit.name not in unit.dense:
            output = None
            if last is not None and self._recipe.metric.kind == "curvature":
                whole = self._recipe.metric.model_copy(update={"per_head": False})
                output = self._output(whole, unit, last)
            kept = [number for number, pair in enumerate(here) if not pair.left_out]
            samples = [(here[n].dense, here[n].small, here[n].counted) for n in kept]
            root = None if output is None else output.roots[0]
            refine(unit, samples, steps, self._overflow, [outputs[n] for n in kept] if outputs else (), root)
            found |= {name: layer.tensors() for name, layer in refined(unit).items()}
        return found, outputs

    def _alone(self, name: str) -> Tensors:
        """A linear without compensation."""
        return self._maker.make(self._parts.linear(name), self._plan.linears[name])

    def _fits(self, unit: Unit, group: Group, sums: dict[Modality, ShiftedSum]) -> dict[str, Fit]:
        """What the sums come to for each linear of a group; nothing where they are of no modality that counts."""
        part = self._recipe.metric
        if not (taken := chosen(part, {modality: modality for modality in sums})):
            return {}
        traces = [sums[m].second.trace() / sums[m].count for m in taken]
        weights, found = dict(zip(taken, joint_weights(traces, part.gamma), strict=True)), {}
        second = sums[taken[0]].taken()
        for modality in taken[1:]:
            second.add_(sums[modality].taken(), alpha=weights[modality])
        for name in group.members:
            linear, W = unit.linears[name], values(unit.dense[name])
            cross = torch.zeros_like(sums[taken[0]].cross[name])
            for modality, weight in weights.items():
                cross += weight * sums[modality].cross.pop(name) / sums[modality].count
            # The dense model's moments are of all calibration samples; they keep the fit from following the few here.
            alone = part.model_copy(update={"kind": "whitening"})  # without the metric of outputs
            moment = layer_metric(alone, linear, self._statistics, W.device).value
            assert moment is not None
            found[name] = Fit(W, weights, second, cross, moment)
        return found

    def _linear(self, unit: Unit, name: str, fit: Fit, weight: float) -> Tensors:
        linear, row, W = unit.linears[name], self._plan.linears[name], fit.W
        recipe, how = self._recipe, self._recipe.compensate
        if weight == 0 and how.kind == "anchored":  # nothing to make up for, as in the first layers
            return self._alone(name)
        heads = form(row.form).heads(row.spec) or 1
        own = recipe.metric.model_copy(update={"kind": self._own_kind, "per_head": heads > 1})
        second, cross = blended(W, fit.second, fit.cross, fit.moment, weight)
        del fit
        value: torch.Tensor | None = second
        if recipe.metric.kind != self._own_kind:  # it does not consist of second moments and is kept
            value = layer_metric(recipe.metric, linear, self._statistics, W.device).value
        with naming(name):
            if how.kind == "adacomp":
                alone = self._maker.problem(linear, heads)
                return form(row.form).alternate(alone, row.spec, second, cross, how.rounds, wide(W).dtype)
            target = anchored_weight(W, second, cross, how.damping)

        def metrics() -> tuple[torch.Tensor | None, OutputMetric | None]:
            return value, self._output(own, unit, name)

        units, seen = self._maker.removal_of(name), positions_behind(recipe.metric, linear, self._statistics)
        given = recipe.stored, recipe.quantize
        problem = Problem(linear, lambda: target, metrics, *given, heads=heads, units=units, positions=seen)
        return made(problem, row.form, row.spec)

    def _output(self, part: MetricPart, unit: Unit, name: str) -> OutputMetric | None:
        device = values(unit.dense[name]).device
        return layer_metric(part, unit.linears[name], self._statistics, device, inputs=False).output

    def _free(self) -> int:
        """Bytes that the memory leaves beside the model and what the largest linear is solved in."""
        linears = [linear for unit in self._units.values() for linear in unit.linears.values()]
        most = max(solving(x, self._recipe, self._statistics.manifest.forms.get(x.name, "full")) for x in linears)
        device = self._model.device
        return max(0, limit_bytes(self._memory, device) - held_memory(device) - most)

    @contextmanager
    def _passes(self) -> Iterator[list[Pair]]:
        """Both passes of every batch, images first, each at its first unit."""
        model, settings, part = self._model, self._statistics.manifest.settings, self._recipe.metric
        how, pairs = self._recipe.compensate, []
        sees = self._parts.tower is not None
        data = reload_data(model, self._processor, self._statistics, sees=sees, samples=how.samples)
        passes: list[Pass] = []
        order: tuple[Modality, ...] = ("image", "text")
        free = self._free()
        self._room = min(_HELD, free // 2)
        units = {name: unit.module for name, unit in self._units.items()}
        with Overflow(free - self._room, self._store.home) as self._overflow, stopping_at(units):
            self._overflow.leave((*model.parameters(), *model.buffers()))
            try:
                for modality in order:
                    if not chosen(part, {modality: modality}):
                        continue
                    number = data.samples.get(modality, 0)
                    fitted = number - how.left_out(number)
                    only = settings.image_tokens_only and modality == "image"
                    # Samples are in random order and those of a batch have one shape: a batch is a bucket.
                    bucket = max(1, -(-fitted // how.buckets)) if how.buckets else settings.batch_size
                    fits, rest = (
                        data.part(some).batches(modality, bucket) for some in (slice(fitted), slice(fitted, None))
                    )
                    for left_out, batch in chain(((False, one) for one in fits), ((True, one) for one in rest)):
                        inputs = model_inputs(model, batch)
                        self._overflow.leave(inputs.values())
                        counted = positions(model, inputs, image_tokens_only=only)
                        forward = partial(model, **inputs, **forward_options(model))
                        dense, small = (Pass(forward, model.device.type, self._overflow) for _ in range(2))
                        for one in (dense, small):
                            passes.append(one)
                            one.start()
                        pairs.append(Pair(modality, left_out, counted, dense, small))
                if not pairs:
                    raise RecipeError(
                        f"compensation needs {part.modality} samples and {self._statistics.path} has none; "
                        f"calibrate with a source of {part.modality} samples"
                    )
                yield pairs
            finally:
                for one in passes:
                    one.close()
