"""Input embedding and output head in integers: what they cost, measured, and their stored tensors.

The linears' losses are predicted from moments; of these two matrices there are none, and they are few: each is rounded
in turn, and the divergence of the model from the dense one is measured on calibration samples.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.calibrate import Statistics
from spectrim.calibrate.data import Data, reload_data
from spectrim.errors import RecipeError
from spectrim.evaluate.divergence import Predictions
from spectrim.linear import Linear
from spectrim.maths.rounding import Grid, quantize, slabs
from spectrim.plan.options import Menu
from spectrim.plan.plan import PlanRow, plan_row
from spectrim.recipe import QuantizePart, Recipe
from spectrim.storage import DENSE, Options, Problem, Spec, Tensors, form, made

TOKENS = 1024  # of each modality, that a rounded matrix is measured on
_BITS = (8, 4)

Prices = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Nats per token by table, bits and modality."""


def bits_of(quantize: QuantizePart) -> tuple[int, ...]:
    """Numbers of bits in which the recipe lets embedding and output head be stored; none if they stay dense."""
    if quantize.embeddings is None:
        return ()
    return _BITS if quantize.embeddings == "auto" else (quantize.embeddings,)


def grid_of(table: Linear, bits: int, quantize: QuantizePart) -> Grid:
    """The grid of a table: of the recipe's group, or of the largest smaller one that divides its width."""
    sizes = [size for size in (128, 64, 32) if size <= (quantize.group or 0) and table.in_features % size == 0]
    return Grid(bits, sizes[0] if sizes else None, quantize.symmetric)


def stored_as(table: Linear, bits: int, quantize: QuantizePart) -> tuple[str, Spec]:
    """Form and spec of a table in so many bits."""
    grid = grid_of(table, bits, quantize).spec
    return ("integers", grid) if table.role == "head" else ("integer-embedding", grid | {"shared": table.shared})


def least_bytes(table: Linear, quantize: QuantizePart) -> int:
    """Of its smallest option."""
    options = [stored_as(table, bits, quantize) for bits in bits_of(quantize)]
    return min([table.nbytes, *(form(kind).nbytes(table, spec) for kind, spec in options)])


@torch.no_grad()
def measured(
    model: PreTrainedModel,
    tables: Sequence[Linear],
    part: QuantizePart,
    data: Data,
    progress: Callable[[int, int], None] | None = None,
) -> Prices:
    """What each table costs in each number of bits, all else dense: Kullback–Leibler divergence from the dense model.

    Raises NumericalError for logits that are not finite.
    """
    choices, found = bits_of(part), dict[str, dict[int, dict[str, float]]]()
    with tempfile.TemporaryDirectory() as folder:
        dense = Predictions(Path(folder))
        dense.gather(model, data, tokens=TOKENS, seed=0, progress=None)
        for table in tables:
            weight = model.get_submodule(table.name).weight
            assert isinstance(weight, torch.Tensor)
            original = weight.detach().clone()
            found[table.name] = {}
            for bits in choices:
                try:
                    grid = grid_of(table, bits, part)
                    for row, X in zip(slabs(weight), slabs(original), strict=True):
                        row.copy_(quantize(X, grid, dtype=X.dtype).dense())
                    rows = dense.compare(model)
                finally:
                    weight.copy_(original)
                found[table.name][bits] = {str(row.modality): row.mean for row in rows}
                if progress is not None:
                    progress(sum(map(len, found.values())), len(tables) * len(choices))
    return found


class Tables:
    """Input embedding and output head of one model under one recipe; measured once, when first asked for."""

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Anatomy,
        recipe: Recipe,
        statistics: Statistics | None,
        processor: Any,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self._model, self._parts, self._recipe = model, parts, recipe
        self._statistics, self._processor, self._progress = statistics, processor, progress
        self._by_name = {table.name: table for table in parts.tables}

    @cached_property
    def _prices(self) -> Prices:
        if self._statistics is None or self._processor is None:
            raise RecipeError(
                "the price of integers in embedding and output head is measured on calibration samples; give "
                "statistics and the model's processor, or set quantize.embeddings to null, 8 or 4"
            )
        sees = self._parts.tower is not None
        data = reload_data(self._model, self._processor, self._statistics, sees=sees, samples=None)
        report = None if self._progress is None else partial(self._progress, "embeddings")
        return measured(self._model, self._parts.tables, self._recipe.quantize, data, report)

    @cached_property
    def menus(self) -> dict[str, Menu]:
        """The options of each, dense among them where the recipe leaves the bits to a size; errors in its nats.

        Raises SpectrimError where the calibration samples are gone.
        """
        return {name: self._menu(table) for name, table in self._by_name.items()}

    def _menu(self, table: Linear) -> Menu:
        part, found = self._recipe.quantize, dict[str, list[tuple[int, float, Spec]]]()
        if part.embeddings == "auto":
            found[DENSE] = [(table.nbytes, 0.0, {})]
        weights = {"text": 1.0, "image": self._recipe.metric.image_price}
        for bits in bits_of(part):
            kind, spec = stored_as(table, bits, part)
            nats = sum(weights[modality] * loss for modality, loss in self._prices[table.name][bits].items())
            found.setdefault(kind, []).append((form(kind).nbytes(table, spec), nats, spec))
        return Menu(table, [Options.listed(kind, rows) for kind, rows in found.items()], np.array([1.0, 0.0]))

    def rows(self, chosen: Mapping[str, int]) -> dict[str, PlanRow]:
        """Rows of a plan: of the options chosen by number, or in the bits that the recipe says."""
        part, found = self._recipe.quantize, {}
        for name, table in self._by_name.items():
            if (number := chosen.get(name)) is not None:
                menu = self.menus[name]
                found[name] = plan_row(table, *menu.option(number), metric="measured", loss=float(menu.error[number]))
            elif isinstance(part.embeddings, int):
                found[name] = plan_row(table, *stored_as(table, part.embeddings, part))
        return found

    def make(self, name: str, row: PlanRow) -> Tensors:
        """The stored tensors of a table as its row says. Raises NumericalError for NaN or infinity."""
        weight, recipe = self._model.get_submodule(name).weight, self._recipe
        assert isinstance(weight, torch.Tensor)
        dense = weight.detach()
        problem = Problem(self._by_name[name], lambda: dense, lambda: (None, None), recipe.storage, recipe.quantize)
        return made(problem, row.form, row.spec)

    def losses(self, name: str, layer: Any) -> Mapping[str, float] | None:
        """Nats by modality that a layer in the place of a table costs, none where nothing was measured.

        None for what is no table.
        """
        if name not in self._by_name:
            return None
        return self._prices[name][layer.spec["bits"]] if self._recipe.quantize.embeddings == "auto" else {}
