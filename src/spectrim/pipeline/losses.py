"""Predicted losses by modality of the layers that take the places of dense linears."""

from copy import deepcopy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spectrim.away import values
from spectrim.calibrate import Statistics
from spectrim.metrics.curvature import predicted_loss
from spectrim.pipeline.tables import Tables
from spectrim.recipe import Recipe


def priced(recipe: Recipe, statistics: Statistics | None) -> Statistics | None:
    """The statistics, where the recipe predicts losses by them."""
    return statistics if recipe.needs_curvature else None


class Losses:
    """A sum over layers: ``total`` in nats per labelled token by modality, None where the recipe predicts no losses."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, statistics: Statistics | None, tables: Tables) -> None:
        self._model, self._recipe, self._tables = model, recipe, tables
        self._statistics = priced(recipe, statistics)
        self.total: dict[str, float] | None = None
        if self._statistics is not None:
            self.total = dict.fromkeys(map(str, self._statistics.manifest.data.modalities), 0.0)

    def add(self, name: str, layer: nn.Module) -> None:
        """Add what a layer in the place of a dense linear, which the model still has, costs each modality."""
        if self._statistics is None or self.total is None:
            return
        if (measured := self._tables.losses(name, layer)) is not None:
            for modality, nats in measured.items():
                self.total[modality] += nats
            return
        exact: Any = deepcopy(layer).double()
        change = exact.change(values(self._model.get_submodule(name)).double())
        for modality in self._statistics.manifest.data.modalities:
            moment, output = self._statistics.moment(name, modality), self._statistics.output(name, modality)
            if moment is not None and output is not None:
                self.total[modality] += predicted_loss(self._recipe.metric.eta, change, moment, output)
