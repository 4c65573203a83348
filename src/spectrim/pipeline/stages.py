"""One dense model under one recipe: spectra → plan → factors (compensated or not) → checkpoint."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.away import is_away
from spectrim.calibrate import Statistics
from spectrim.calibrate.data import reload_data
from spectrim.calibrate.passes import short_samples
from spectrim.calibrate.probe import written_bytes
from spectrim.checkpoint import attach, save
from spectrim.checkpoint.check import check_written, runnable
from spectrim.checkpoint.offload import put_away
from spectrim.compensate import Compensation
from spectrim.disk.shelf import Shelf
from spectrim.errors import RecipeError
from spectrim.estimate import Cost, compared
from spectrim.metrics.metric import chosen as taken_by
from spectrim.metrics.metric import summed
from spectrim.metrics.spectra import Spectra
from spectrim.pipeline.budget import Budget, Sizes
from spectrim.pipeline.jobs import Job, priced_tables, shared, too_small
from spectrim.pipeline.losses import Losses, priced
from spectrim.pipeline.measured import Measured
from spectrim.pipeline.record import provenance
from spectrim.pipeline.tables import Tables
from spectrim.plan.importance import SAMPLES, block_cosines, importance
from spectrim.plan.maker import Maker
from spectrim.plan.options import Menu
from spectrim.plan.plan import Plan, plan_row
from spectrim.plan.rules import curve
from spectrim.plan.sensitivity import WINDOWS, probe
from spectrim.plan.spend import spend
from spectrim.plan.teams import Teams
from spectrim.plan.units import Units
from spectrim.recipe import Recipe
from spectrim.samples import load_windows
from spectrim.storage import DENSE, Spec, Tensors, filled, share, unshare
from spectrim.storage.base import checked_linear
from spectrim.tune import Tuned, Tuning, beside

_log = logging.getLogger("spectrim")

Progress = Callable[[str, int, int], None]
"""Called with the stage, how much of it is done, and how much there is."""


class Compression:
    """One dense model under one recipe: decomposed once, then planned and factored for any number of budgets."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        statistics: Statistics | None,
        spectra: Spectra,
        parts: Anatomy,
        processor: Any = None,
        progress: Progress | None = None,
        cost: Cost | None = None,
        memory: str | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.recipe = recipe
        self.statistics = statistics
        self.spectra = spectra
        self.parts = parts
        self.progress = progress
        self._memory = memory  # the limit, as of `calibrate`
        self._cost = cost  # estimated, and the clock
        self.written = 0  # bytes of checkpoints so far
        self.maker = Maker(model, parts, recipe, statistics, spectra)
        self._tables = Tables(model, parts, recipe, statistics, processor, progress)
        self._tuned: Tuned | None = None

    def plan(self, retain: float | None = None, **limit: Any) -> Plan:
        """The plan of least loss within one limit, and less than one step of any linear below it.

        Args:
            retain: share of the linears' dense bytes, in (0, 1].
            limit: in its place, one of the others of :class:`Budget`: bits, or size and what it is to hold.

        Raises:
            BudgetError: the limit is none, or cannot be met; says what can.
        """
        return self.planned(Budget(retain, **limit))

    def planned(self, budget: Budget) -> Plan:
        """The plan of least loss within a limit. Raises BudgetError where it cannot be met; says what can."""
        free, share = shared(self.recipe, self.parts, budget, self.sizes, self._left_dense, self._samples)
        searching = None if self.progress is None else partial(self.progress, "options")
        menus, wanted = self.maker.menus(free, searching), self._wanted()
        if budget.context is not None:
            menus = self.sizes.cache(budget).added(menus)
        rule = self.recipe.allocation
        teams = Teams(free if self.recipe.storage.experts == "same" else (), menus)
        menus = (units := Units(self.maker.units, menus)).menus
        curves = units.joined(teams.joined({x.name: curve(rule, menus[x.name], wanted(x.name)) for x in free}))
        for table in priced_tables(self.recipe, self.parts, budget):
            curves[table.name] = curve(rule, self._tables.menus[table.name], None)
        every = list(curves.values())

        def chosen(numbers: Iterable[int]) -> Plan:
            return self._chosen(budget, menus, teams.each(units.each(dict(zip(curves, numbers, strict=True)))))

        smallest = [int(options.front[0]) for options in every]
        least = sum(int(options.bytes[number]) for options, number in zip(every, smallest, strict=True))
        if budget.size is None:
            if least > share:
                raise too_small(self.recipe, budget, self.sizes, share, least)
            return chosen(spend(every, share))
        limit, best = budget.size_bytes, chosen(smallest)
        if (over := self.sizes.counted(best, budget) - limit) > 0:
            raise too_small(self.recipe, budget, self.sizes, share, share + over)
        low, high = least, share + 1
        while high - low > 1:  # names take bytes, too: more of them where linears are made of more tensors
            plan = chosen(spend(every, share))
            over = self.sizes.counted(plan, budget) - limit
            if over > 0:
                high = share
            else:
                best, low = plan, share
                if -over <= limit // 1000 or high - low <= limit // 1000:
                    break
            share = share - over if low < share - over < high else (low + high) // 2
        return best

    def _chosen(self, budget: Budget, menus: Mapping[str, Menu], chosen: Mapping[str, int]) -> Plan:
        """The plan of one option, by number, of each linear on a menu."""
        rows = {}
        for linear in self.parts.linears:
            source, priced = self.spectra.sources[linear.name], self.spectra.spectrum(linear.name).loss is not None
            spec: Spec
            kind, spec, lost, error, reason = DENSE, {}, 0.0, 0.0, None
            if (number := chosen.get(linear.name)) is not None:
                menu = menus[linear.name]
                (kind, spec), lost = menu.option(number), float(menu.error[number])
                error = lost / max(float(menu.left[0]), 1e-300)
            else:
                reason = self.recipe.allocation.reason(linear) or f"no {self._samples} sample reaches it"
            loss = lost if priced else None
            rows[linear.name] = plan_row(linear, kind, spec, error=error, metric=source, loss=loss, reason=reason)
        tables = self._tables.rows(chosen)
        return Plan(recipe=self.recipe.name, retain=budget.retain, limit=budget.label, linears=rows, tables=tables)

    @cached_property
    def measured(self) -> Measured | None:
        """What plans of this recipe were found to cost; None where it predicts no losses."""
        statistics = priced(self.recipe, self.statistics)
        return None if statistics is None else Measured(statistics, self.parts, self.recipe)

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes of the model's files under any plan."""
        return Sizes(self.model, self.parts)

    def plans(self, job: Job) -> list[Plan]:
        """The plans that a job asks for, one for each of its targets."""
        if job.plan is None:
            return [self.planned(budget) for budget in job.budgets]
        return [job.fitted_plan(self.parts)]

    @cached_property
    def unreached(self) -> frozenset[str]:
        """Names of the linears that no sample says anything about.

        Where predicted losses are compared, that is all that none of the recipe's modality reaches.
        """
        found, rule = self.spectra.sources, self.recipe.allocation.rule
        blind = {name for name in found if rule == "loss-aware" and self.spectra.spectrum(name).loss is None}
        return frozenset(name for name, source in found.items() if name in blind or source == "unreached")

    @cached_property
    def _left_dense(self) -> frozenset[str]:
        """The same, which plans of the recipe therefore leave dense."""
        if names := [name for name in self.spectra.sources if name in self.unreached]:
            some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            told = len(names), len(self.spectra.sources), self._samples, some
            _log.warning("%d of %d linears stay dense, since no %s sample reaches them: %s", *told)
        return self.unreached

    @property
    def _samples(self) -> str:
        """Whose samples the metric counts, for messages."""
        wanted: tuple[str, ...] = () if self.statistics is None else self.statistics.manifest.data.modalities
        return " or ".join(m for m in wanted if self.recipe.metric.modality in (m, "joint"))

    def _wanted(self) -> Callable[[str], torch.Tensor | float | None]:
        """What the allocation rule compares beside errors (see :func:`spectrim.plan.rules.curve`), by linear."""
        rule, spectra = self.recipe.allocation.rule, self.spectra
        if rule == "adacr":
            return importance(self.parts, self._cosines, self.recipe.allocation.importance).__getitem__
        if rule == "global-sigma":
            counted = partial(summed, self.recipe.metric, self.parts, spectra.sources, self.statistics)
            return lambda name: (spectra.spectrum(name).s * counted(name)).sqrt()
        if rule == "global-sigma-mean":
            return lambda name: spectra.spectrum(name).s.sqrt()
        return self._losses.__getitem__ if rule == "sensitivity" else lambda name: None

    @cached_property
    def _losses(self) -> Mapping[str, torch.Tensor]:
        if self.statistics is None or (text := self.statistics.manifest.data.text) is None or self.processor is None:
            raise RecipeError("allocation 'sensitivity' needs text statistics and the model's processor; give both")
        settings = self.statistics.manifest.settings
        samples = min(WINDOWS, settings.samples)
        windows = load_windows(text, self.processor, samples=samples, seqlen=settings.seqlen, seed=settings.seed)
        return probe(self.model, self.parts, self.spectra, windows)

    @cached_property
    def _cosines(self) -> Mapping[str, float]:
        if self.statistics is None or self.processor is None:
            raise RecipeError(
                "allocation 'adacr' measures blocks on calibration samples; give statistics and the model's "
                "processor, or set allocation.rule=uniform"
            )
        sees = self.parts.tower is not None
        data = reload_data(self.model, self.processor, self.statistics, sees=sees, samples=SAMPLES)
        only = self.statistics.manifest.settings.image_tokens_only
        return block_cosines(self.model, self.parts, data, image_tokens_only=only)

    @torch.no_grad()
    def predicted(self, plan: Plan) -> dict[str, float] | None:
        """Predicted increase of the loss of each modality, nats per labelled token; None without curvature.

        The plan's own losses are in the recipe's metric, where modalities may be joined. Linears are made for it,
        without compensation.
        """
        losses = Losses(self.model, self.recipe, self.statistics, self._tables)
        for name in plan.exchanged:
            losses.add(name, self._layer(plan, name, {}))
        return losses.total

    def _layer(self, plan: Plan, name: str, solved: Mapping[str, Tensors]) -> nn.Module:
        """The layer that takes the place of a dense linear; made here unless it is among the `solved`."""
        row = plan.rows[name]
        if name in plan.tables:
            tensors = self._tables.make(name, row)
        else:
            tensors = solved[name] if name in solved else self.maker.make(self.parts.linear(name), row)
        return filled(checked_linear(self.model, name, row.form), row.form, row.spec, tensors)

    @torch.no_grad()
    def _put(self, plan: Plan) -> dict[str, float] | None:
        """Exchange the linears of the model, each made once; returns the predicted losses by modality.

        Where plans of the recipe were measured, they tell. Otherwise, with compensation, nothing predicts by modality
        what is left: the plan's own prediction stands (see `_joint`).
        """
        plan.check_outputs(self.maker.all_units)
        told = self.measured.at(plan.loss) if self.measured and plan.loss is not None else None
        losses = None
        if told is None and self.recipe.compensate.kind == "none":
            losses = Losses(self.model, self.recipe, self.statistics, self._tables)
        dense = beside(self.model) if self.recipe.tune.epochs else None
        # What is made of a model that is larger than its memory waits on disk, too, unless it is to be trained.
        shelf = Shelf(self.spectra.directory) if dense is None and is_away(self.model) else None
        solved = self._compensated(plan)
        for name in plan.exchanged:
            layer = self._layer(plan, name, solved)
            if losses is not None:
                losses.add(name, layer)
            self.model.set_submodule(name, layer)
            if shelf is not None and name not in plan.tables:
                put_away(layer, shelf)
        share(self.model)
        if plan.exchanged:
            attach(self.model)
        self._tuned = None if dense is None else self._tune(plan, dense)
        if told is not None:
            return told
        return self._joint(plan) if losses is None else losses.total

    def _joint(self, plan: Plan) -> dict[str, float] | None:
        """The plan's own prediction, of its linears by themselves, in the recipe's metric.

        It bears the name of the modality if that metric is made of one.
        """
        if plan.loss is None:
            return None
        assert self.statistics is not None
        given = {modality: modality for modality in self.statistics.manifest.data.modalities}
        taken = taken_by(self.recipe.metric, given)
        return {str(taken[0]) if len(taken) == 1 else "joint": plan.loss}

    def apply(self, plan: Plan) -> PreTrainedModel:
        """Compress the model in place, as the plan says; it then saves, loads and dequantizes like any other.

        A failure leaves it dense. Raises SpectrimError where the recipe compensates and its samples are missing (see
        ``compensate.Compensation``).
        """
        with self._dense_after(plan, failure=True):
            self._put(plan)
        return self.model

    def _tune(self, plan: Plan, dense: PreTrainedModel) -> Tuned | None:
        """Train the compressed model towards the dense one."""
        if self.statistics is None or self.processor is None:
            raise RecipeError(
                "the end-to-end pass runs the calibration samples through the model; give statistics and the model's "
                "processor, or set tune.epochs=0"
            )
        progress = None if self.progress is None else partial(self.progress, "tune")
        given = self.parts, self.recipe, plan, self.statistics, self.processor
        return Tuning(dense, self.model, *given).run(progress)

    def _compensated(self, plan: Plan) -> Mapping[str, Tensors]:
        """Compensated linears by name; none where the recipe does not compensate."""
        if self.recipe.compensate.kind == "none":
            return {}
        if self.statistics is None or self.processor is None:
            raise RecipeError(
                "compensation runs the calibration samples through the model again; give statistics and the model's "
                "processor, or set compensate.kind=none"
            )
        progress = None if self.progress is None else partial(self.progress, "compensate")
        return Compensation(
            self.model, self.parts, self.recipe, plan, self.maker, self.statistics, self.processor, self._memory
        ).solve(progress)

    @contextmanager
    def applied(self, plan: Plan) -> Iterator[PreTrainedModel]:
        """The compressed model inside the block, the dense one again after it."""
        with self._dense_after(plan):
            self._put(plan)
            yield self.model

    @contextmanager
    def _dense_after(self, plan: Plan, *, failure: bool = False) -> Iterator[None]:
        """Put the dense linears back after the block; with `failure`, only if it fails."""
        dense: dict[str, nn.Module] = {name: self.model.get_submodule(name) for name in plan.exchanged}
        tuned = [(x, x.detach().clone()) for x in self.model.parameters() if x.ndim == 1 and self.recipe.tune.epochs]

        def restore() -> None:
            for parameter, value in tuned:
                parameter.data.copy_(value)
            for name, linear in dense.items():
                self.model.set_submodule(name, linear)
            unshare(self.model)
            if quantizer := getattr(self.model, "hf_quantizer", None):
                quantizer.remove_quantization_config(self.model)

        with ExitStack() as stack:
            stack.callback(restore)
            yield
            if failure:
                stack.pop_all()

    def provenance(self, plan: Plan) -> dict[str, Any]:
        """What spectrim.json records of a plan."""
        return provenance(self.model, self.parts, self.recipe, self.statistics, plan, self.unreached)

    @cached_property
    def _compared(self) -> list[Mapping[str, torch.Tensor]]:
        """The inputs on which written checkpoints are compared with the model in memory; one set for all budgets."""
        sees = self.parts.tower is not None
        return runnable(self.model, short_samples(self.model, self.processor, self.statistics, sees=sees))

    def save(
        self, plan: Plan, out: str | Path, *, processor: Any = None, overwrite: bool = False, keep: bool = False
    ) -> Path:
        """Write the checkpoint of one plan; the model is dense again afterwards, unless asked to `keep` it compressed.

        Each linear is made once; what the checkpoint records of them comes from what was made.
        """
        record, samples = self.provenance(plan), self._compared
        with self._dense_after(plan, failure=keep):
            record["predicted_loss"] = self._put(plan)
            if self._tuned is not None:
                record["tuned"] = asdict(self._tuned)
            return save(
                self.model,
                out,
                processor=processor,
                provenance=record,
                files={"plan.json": plan.json()},
                overwrite=overwrite,
                format=self.recipe.quantize.format,
                verify=lambda directory: self._verified(directory, samples),
            )

    def _verified(self, directory: Path, samples: list[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
        """Compare what was written with the model in memory; returns what it took, for the record."""
        check_written(self.model, directory, samples)
        self.written += written_bytes(directory)
        calibrated = None if self.statistics is None else self.statistics.cost()
        cost = {} if calibrated is None else {"calibrate": calibrated}
        if self._cost is not None:
            cost["compress"] = compared(self._cost.estimate, self._cost.so_far(self.written))
        return {"cost": cost} if cost else {}
