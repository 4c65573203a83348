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


class Losses:
    """A sum over layers: ``total`` in nats per labelled token by modality, None where the recipe predicts no losses."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, statistics: Statistics | None, tables: Tables) -> None:
        self._model, self._recipe, self._statistics, self._tables = model, recipe, statistics, tables
        self.total: dict[str, float] | None = None
        if statistics is not None and recipe.needs_curvature:
            self.total = dict.fromkeys(map(str, statistics.manifest.data.modalities), 0.0)

    def add(self, name: str, layer: nn.Module) -> None:
        """Add what a layer in the place of a dense linear, which the model still has, costs each modality."""
        if self.total is None:
            return
        assert self._statistics is not None
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
