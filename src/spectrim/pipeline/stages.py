"""One dense model under one recipe: spectra → plan → factors (compensated or not) → checkpoint."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.calibrate import Statistics
from spectrim.calibrate.data import load_data, reload_data
from spectrim.calibrate.passes import model_inputs
from spectrim.checkpoint import attach, save
from spectrim.checkpoint.check import check_written, runnable
from spectrim.compensate import Compensation
from spectrim.errors import RecipeError, SpectrimError
from spectrim.maths.decompose import factors
from spectrim.metrics.curvature import predicted_loss
from spectrim.metrics.metric import summed
from spectrim.metrics.spectra import Spectra
from spectrim.pipeline.jobs import Job, shared
from spectrim.plan.allocate import choice, spend
from spectrim.plan.hybrid import Hybrid
from spectrim.plan.importance import SAMPLES, block_cosines, importance
from spectrim.plan.plan import Plan, PlanRow, counted, factor_params, pays_by_pivots, plan_row
from spectrim.plan.sensitivity import WINDOWS, probe
from spectrim.recipe import Recipe
from spectrim.samples import load_text, text_windows
from spectrim.storage.make import Stored, plain
from spectrim.trace import few_tokens

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
    ) -> None:
        self.model = model
        self.processor = processor
        self.recipe = recipe
        self.statistics = statistics
        self.spectra = spectra
        self.parts = parts
        self._progress = progress
        self._losses: Mapping[str, torch.Tensor] | None = None
        self._cosines: Mapping[str, float] | None = None
        self._hybrid: Hybrid | None = None

    @property
    def hybrid(self) -> Hybrid:
        """The options of integer weights, and those weights."""
        if self._hybrid is None:
            self._hybrid = Hybrid(self.model, self.recipe, self.statistics, self.spectra)
        return self._hybrid

    def plan(self, retain: float) -> Plan:
        """The plan that keeps at most `retain` of the linears' dense bytes, and less than one rank step below it.

        Raises:
            BudgetError: `retain` is not in (0, 1], or cannot be met.
        """
        part = self.recipe.allocation
        free, budget = shared(self.recipe, self.parts, retain, self.unreached, self._samples)
        if self.recipe.quantize.bits is not None:
            hybrid = self.hybrid.rows(free, budget)
            sources = self.spectra.sources
            rows = {x.name: hybrid.get(x.name) or plan_row(x, None, 0.0, sources[x.name]) for x in self.parts.linears}
            return Plan(recipe=self.recipe.name, retain=retain, linears=rows)
        wanted, spectra, storage = self._wanted(), self.spectra, self.recipe.storage
        by_pivots = storage.pivoted
        options: dict[str, Any] = {"pivoted": by_pivots, "multiple": storage.multiple}
        choices = {
            x.name: choice(part, x, wanted(x.name), spectra.losses(x.name), spectra.heads(x.name), **options)
            for x in free
        }
        counts = spend(choices, budget)
        rows = {}
        for linear in self.parts.linears:
            count, s, losses = counts.get(linear.name), spectra.values(linear.name), spectra.losses(linear.name)
            error, loss = 0.0, None if losses is None else 0.0
            if count is not None:
                error = float(s[count:].sum() / s.sum().clamp_min(1e-300))
                loss = None if losses is None else float(losses[count:].sum())
            rank = None if count is None else spectra.rank(linear.name, count)
            pivoted = by_pivots and pays_by_pivots(linear, rank)
            source = spectra.sources[linear.name]
            rows[linear.name] = plan_row(linear, rank, error, source, loss=loss, pivoted=pivoted)
        return Plan(recipe=self.recipe.name, retain=retain, linears=rows)

    def plans(self, job: Job) -> list[Plan]:
        """The plans that a job asks for, one for each of its targets."""
        if job.plan is None:
            return [self.plan(retain) for retain in job.retains]
        return [job.fitted_plan(self.parts)]

    @cached_property
    def unreached(self) -> frozenset[str]:
        """Names of the linears that no sample says anything about, which therefore stay dense.

        Where predicted losses are compared, that is all that none of the recipe's modality reaches.
        """
        found, rule = self.spectra.sources, self.recipe.allocation.rule
        blind = {name for name in found if rule == "loss-aware" and self.spectra.losses(name) is None}
        names = [name for name, source in found.items() if name in blind or source == "unreached"]
        if names:
            some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            _log.warning(
                "%d of %d linears stay dense, since no %s sample reaches them: %s",
                len(names),
                len(found),
                self._samples,
                some,
            )
        return frozenset(names)

    @property
    def _samples(self) -> str:
        """Whose samples the metric counts, for messages."""
        wanted: tuple[str, ...] = () if self.statistics is None else self.statistics.manifest.data.modalities
        return " or ".join(m for m in wanted if self.recipe.metric.modality in (m, "joint"))

    def _wanted(self) -> Callable[[str], torch.Tensor]:
        """What the allocation rule compares: spectra, measured losses (`sensitivity`) or importance (`adacr`)."""
        if self.recipe.allocation.rule == "adacr":
            found = importance(self.parts, self._measured_cosines(), self.recipe.allocation.importance)
            return lambda name: torch.full_like(self.spectra.values(name), found[name])
        if self.recipe.allocation.rule == "global-sigma":
            metric, sources = self.recipe.metric, self.spectra.sources
            return lambda name: self.spectra.values(name) * summed(metric, name, sources[name], self.statistics)
        if self.recipe.allocation.rule != "sensitivity":
            return self.spectra.values
        if self._losses is None:
            if self.statistics is None or self.statistics.manifest.data.text is None or self.processor is None:
                raise RecipeError("allocation 'sensitivity' needs text statistics and the model's processor; give both")
            data, settings = self.statistics.manifest.data, self.statistics.manifest.settings
            windows = text_windows(
                load_text(str(data.text), processor=self.processor),
                getattr(self.processor, "tokenizer", self.processor),
                samples=min(WINDOWS, settings.samples),
                seqlen=settings.seqlen,
                seed=settings.seed,
            )
            self._losses = probe(self.model, self.parts, self.spectra, windows)
        return self._losses.__getitem__

    def _measured_cosines(self) -> Mapping[str, float]:
        if self._cosines is None:
            if self.statistics is None or self.processor is None:
                raise RecipeError(
                    "allocation 'adacr' measures blocks on calibration samples; give statistics and the model's "
                    "processor, or set allocation.rule=uniform"
                )
            sees = self.parts.tower is not None
            data = reload_data(self.model, self.processor, self.statistics, sees=sees, samples=SAMPLES)
            only = self.statistics.manifest.settings.image_tokens_only
            self._cosines = block_cosines(self.model, self.parts, data, image_tokens_only=only)
        return self._cosines

    @torch.no_grad()
    def predicted(self, plan: Plan) -> dict[str, float] | None:
        """Predicted increase of the loss of each modality, nats per labelled token; None without curvature.

        The plan's own losses are in the recipe's metric, where modalities may be joined.
        """
        if self.statistics is None or not self.recipe.needs_curvature:
            return None
        found = dict.fromkeys(self.statistics.manifest.data.modalities, 0.0)
        for name in plan.changed:
            W: Any = self.model.get_submodule(name).weight
            small = self._stored(name, plan.linears[name]).weight()
            for modality in found:
                moment, output = self.statistics.moment(name, modality), self.statistics.output(name, modality)
                if moment is not None and output is not None:
                    found[modality] += predicted_loss(self.recipe.metric.eta, small - W.double(), moment, output)
        return {str(modality): loss for modality, loss in found.items()}

    def _stored(self, name: str, row: PlanRow) -> Stored:
        """A linear as a row says, without compensation."""
        linear = self.parts.linear(name)
        if row.integers is not None:
            return self.hybrid.stored(linear, row)
        assert row.rank is not None
        W: Any = self.model.get_submodule(name).weight
        return plain(name, *factors(W, *self.spectra.directions(name, row.rank, W.device)))

    @torch.no_grad()
    def apply(self, plan: Plan) -> PreTrainedModel:
        """Factor the model in place, as the plan says; it then saves, loads and dequantizes like any other.

        Raises:
            SpectrimError: the recipe compensates, and its samples are missing (see ``compensate.Compensation``).
        """
        compensated = self._compensated(plan)
        for name in plan.changed:
            row = plan.linears[name]
            found = compensated.get(name) or self._stored(name, row)
            found.put(self.model, name, row.rank, pivoted=row.pivoted)
        return attach(self.model) if plan.changed else self.model

    def _compensated(self, plan: Plan) -> Mapping[str, Stored]:
        """Compensated linears by name; none where the recipe wants none."""
        if self.recipe.compensate.kind == "none":
            return {}
        if self.statistics is None or self.processor is None:
            raise RecipeError(
                "compensation runs the calibration samples through the model again; give statistics and the model's "
                "processor, or set compensate.kind=none"
            )
        progress = None if self._progress is None else partial(self._progress, "compensate")
        return Compensation(
            self.model, self.parts, self.recipe, plan, self._stored, self.statistics, self.processor
        ).solve(progress)

    @contextmanager
    def applied(self, plan: Plan) -> Iterator[PreTrainedModel]:
        """The factored model inside the block, the dense one again after it."""
        dense: dict[str, nn.Module] = {name: self.model.get_submodule(name) for name in plan.changed}
        try:
            yield self.apply(plan)
        finally:
            for name, linear in dense.items():
                self.model.set_submodule(name, linear)
            if quantizer := getattr(self.model, "hf_quantizer", None):
                quantizer.remove_quantization_config(self.model)

    def provenance(self, plan: Plan) -> dict[str, Any]:
        """What spectrim.json records: recipe, what was kept in all and by place, data, versions."""
        params = sum(linear.params for linear in self.parts.linears)
        kept = sum(
            linear.params if row.rank is None else factor_params(linear, *counted(row.rank), row.pivoted)
            for linear, row in zip(self.parts.linears, plan.linears.values(), strict=True)
        )
        whole = sum(p.numel() * p.dtype.itemsize for p in self.model.parameters())
        data = None if self.statistics is None else self.statistics.manifest
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "retention": {
                "asked": plan.retain,
                "bytes": plan.bytes / plan.dense_bytes,
                "params": kept / params,
                "checkpoint": (whole - plan.dense_bytes + plan.bytes) / whole,
            },
            "bytes": {"linears": plan.bytes, "linears_dense": plan.dense_bytes},
            "places": plan.by_place(self.parts),
            "predicted_loss": self.predicted(plan),
            "unreached": sorted(self.unreached - set(plan.changed)),
            "data": None if data is None else data.data.model_dump(mode="json"),
            "calibration": None if data is None else data.settings.model_dump(mode="json"),
            "versions": None if data is None else data.versions,
        }

    @cached_property
    def _compared(self) -> list[Mapping[str, torch.Tensor]]:
        """The inputs on which written checkpoints are compared with the model in memory; one set for all budgets."""
        return runnable(self.model, self._short_samples())

    def _short_samples(self) -> list[dict[str, torch.Tensor]]:
        """Inputs of one short sample of each modality; tokens alone where no samples are at hand."""
        if self.statistics is not None and self.processor is not None:
            source, settings = self.statistics.manifest.data, self.statistics.manifest.settings
            options: dict[str, Any] = {"text": source.text, "images": source.images, "seed": settings.seed}
            options |= {"samples": 1, "seqlen": min(settings.seqlen, 32), "instruction": settings.instruction}
            try:
                data = load_data(self.model, self.processor, sees=self.parts.tower is not None, **options)
                batches = [next(data.batches(modality, 1)) for modality in data.samples]
            except SpectrimError:  # they may be gone since
                batches = []
            if batches:
                return [model_inputs(self.model, batch) for batch in batches]
        return [few_tokens(self.model, 5)]

    def save(self, plan: Plan, out: str | Path, *, processor: Any = None, overwrite: bool = False) -> Path:
        """Write the checkpoint of one plan; the model is dense again afterwards."""
        record, samples = self.provenance(plan), self._compared
        record["retention"] = {key: value for key, value in record["retention"].items() if value is not None}
        with self.applied(plan) as model:
            return save(
                model,
                out,
                processor=processor,
                provenance=record,
                files={"plan.json": plan.json()},
                overwrite=overwrite,
                verify=lambda directory: check_written(model, directory, samples),
            )
