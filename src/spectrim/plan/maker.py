"""Makes the linears of one model under one recipe: the options of each, and the stored tensors of the one chosen."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from spectrim.anatomy import Anatomy
from spectrim.away import values
from spectrim.calibrate import Statistics
from spectrim.disk.lock import writing
from spectrim.disk.sealed import open_sealed, write_sealed
from spectrim.errors import NumericalError
from spectrim.linear import Linear
from spectrim.maths.decompose import OutputMetric
from spectrim.maths.removal import Removal
from spectrim.maths.roots import check_finite
from spectrim.metrics.metric import layer_metric, positions_behind
from spectrim.metrics.spectra import Spectra
from spectrim.plan.options import Menu, menu
from spectrim.plan.plan import PlanRow
from spectrim.plan.units import units_of
from spectrim.recipe import Recipe
from spectrim.storage import Problem, Tensors, form, forms, made

VERSION = 5  # of what options and tensors on disk mean; a change makes earlier files unused


def solving(linear: Linear, recipe: Recipe, form: str = "full") -> int:
    """About the most bytes that the steps of one linear take at once, its float64 metrics among them.

    Copies of the metrics are those of benchmarks/wide_linears.py: the sums of a modality are beside the metric that
    they are added to, and compensation and integers with feedback need more. No limit of memory bounds them. `form` is
    that of the output moment, which only integers make a matrix of where it is none.
    """
    out, size = linear.out_features, linear.in_features
    integers = recipe.quantize.takes(linear.role)
    fitted = integers or recipe.compensate.kind != "none"
    inputs = (5 if fitted else 2) * size**2 if recipe.metric.kind in ("whitening", "curvature") else 0
    whole = recipe.metric.kind == "curvature" and (form == "full" or integers)
    return 8 * (inputs + (4 if fitted else 2) * out**2 * whole + 6 * out * size)


class Maker:
    """Of one dense model, its spectra, and the statistics that they were made of (None where the recipe needs none)."""

    def __init__(
        self, model: nn.Module, parts: Anatomy, recipe: Recipe, statistics: Statistics | None, spectra: Spectra
    ) -> None:
        self._model, self._parts, self._recipe = model, parts, recipe
        self._statistics, self._spectra = statistics, spectra
        self._menus: dict[str, Menu] = {}
        self._removals: dict[str, Removal] = {}

    def problem(self, linear: Linear, heads: int | None = None) -> Problem:
        """A linear in the recipe's metrics; with `heads` parts of its outputs apart, or as the recipe factors it."""
        part, spectrum = self._recipe.metric, self._spectra.spectrum(linear.name)
        as_kept = heads is None or heads == spectrum.heads
        if not as_kept:
            part = part.model_copy(update={"per_head": heads != 1})
        weight = values(self._model.get_submodule(linear.name))

        def metrics() -> tuple[torch.Tensor | None, OutputMetric | None]:
            metric = layer_metric(part, linear, self._statistics, weight.device)
            return metric.value, metric.output

        return Problem(
            linear,
            lambda: check_finite(f"the weight of {linear.name}", weight),
            metrics,
            self._recipe.stored,
            self._recipe.quantize,
            heads=spectrum.heads if heads is None else heads,
            kept=spectrum if as_kept else None,
            units=self.removal_of(linear.name),
            positions=positions_behind(part, linear, self._statistics),
        )

    @cached_property
    def units(self) -> Mapping[str, tuple[str, ...]]:
        """The MLPs that may lose units (see :func:`spectrim.plan.units.units_of`); none where the recipe has none."""
        return self.all_units if self._recipe.stored.narrow else {}

    @cached_property
    def all_units(self) -> Mapping[str, tuple[str, ...]]:
        """All MLPs of which units can be taken, as a plan may ask of a recipe that would not."""
        return units_of(self._parts.linears, self._model)

    def removal_of(self, name: str) -> Callable[[], Removal] | None:
        """What gives the order in which the units go that a linear computes or reads; None for other linears."""
        reader = next((reader for reader, first in self.all_units.items() if name in (reader, *first)), None)
        return None if reader is None else partial(self._removal, reader)

    def _removal(self, reader: str) -> Removal:
        if reader not in self._removals:
            self._removals[reader] = replace(self.problem(self._parts.linear(reader)), units=None).removal
        return self._removals[reader]

    def menus(self, linears: Sequence[Linear], progress: Callable[[int, int], None] | None = None) -> dict[str, Menu]:
        """All options of linears, by name. What took long to find is kept beside the spectra for other budgets.

        Raises:
            NumericalError: a weight or a metric holds NaN or infinity; names the linear.
            StatisticsError: options cannot be read or written.
        """
        kept = self._home
        missing = [linear for linear in linears if linear.name not in self._menus]
        paths = {linear.name: kept / f"{linear.name}.safetensors" for linear in missing}
        if progress is not None and missing:
            progress(0, len(missing))
        with ExitStack() as stack:
            searches = self._recipe.quantize.bits is not None or self._recipe.stored.narrow
            if searches and not all(path.exists() for path in paths.values()):
                stack.enter_context(self._writing())
            for done, linear in enumerate(missing):
                try:
                    self._menus[linear.name] = menu(self.problem(linear), paths[linear.name])
                except NumericalError as error:
                    raise NumericalError(f"{linear.name}: {error}") from error
                if progress is not None:
                    progress(done + 1, len(missing))
        return {linear.name: self._menus[linear.name] for linear in linears}

    def make(self, linear: Linear, row: PlanRow) -> Tensors:
        """The stored tensors of a linear as its row of the plan says.

        Those of forms that search long are kept beside the options: between two sizes most linears keep their form.

        Raises:
            NumericalError: a weight or a metric holds NaN or infinity; names the linear.
            StatisticsError: kept tensors cannot be read or written.
        """
        kind = form(row.form)
        problem = self.problem(linear, kind.heads(row.spec))
        if not kind.searches:
            return made(problem, row.form, row.spec)
        of = json.dumps([linear.name, row.form, row.spec], sort_keys=True)
        kept = self._home / linear.name / f"{hashlib.sha256(of.encode()).hexdigest()[:16]}.safetensors"
        if kept.exists():
            file = open_sealed(kept, of=of)
            return {name: file.tensor(name) for name in file.digests}
        with self._writing():
            tensors = made(problem, row.form, row.spec)
            write_sealed(kept, tensors, of=of)
        return tensors

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self._home if self._statistics is None else self._statistics.path, alone=False)

    @property
    def _home(self) -> Path:
        """Where options, and what was made of them, are kept; named by all that they depend on."""
        recipe, directory = self._recipe, self._spectra.directory
        parts = [part.model_dump(mode="json", exclude={"embeddings"}) for part in (recipe.stored, recipe.quantize)]
        content = [VERSION, directory.name, *parts, [x.name for x in forms() if x.searches]]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        return directory.parent.parent / "options" / key
