"""What plans of a recipe were found to cost, which tells what its other plans cost (docs/methods.md, section 3)."""

import hashlib
import json
import math
from collections.abc import Mapping

import numpy as np

from spectrim.anatomy import Anatomy
from spectrim.calibrate import Statistics
from spectrim.disk.lock import writing
from spectrim.errors import StatisticsError
from spectrim.files import read_object, write_whole
from spectrim.metrics.spectra import cache_key
from spectrim.plan import maker
from spectrim.plan.key import COMPENSATED
from spectrim.recipe import Recipe
from spectrim.tune import run as tune

# Of what the numbers mean, and of what they are measured on; a change makes earlier files unused.
VERSIONS = (1, maker.VERSION, COMPENSATED, tune.VERSION)
_LEAST = 1e-6  # nats; below it there is rounding alone

Nats = Mapping[str, float]
"""Mean divergence from the dense model by modality, nats per predicted token."""


class Measured:
    """Predicted losses and measured divergences of plans of one recipe; they are a file of the statistics directory.

    False while there are none. Raises StatisticsError for a file that cannot be read.
    """

    def __init__(self, statistics: Statistics, parts: Anatomy, recipe: Recipe) -> None:
        content = recipe.model_dump(mode="json", exclude={"version", "name", "summary", "paper"})
        key = json.dumps([*VERSIONS, cache_key(recipe.metric, statistics, parts), content], sort_keys=True)
        self._directory = statistics.path
        self._rounds_tables = isinstance(recipe.quantize.embeddings, int)  # which costs something under every plan
        self._path = statistics.path / "measured" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        self._found = self._read()

    def _read(self) -> dict[float, Nats]:
        if not self._path.exists():
            return {}
        try:
            rows = read_object(self._path)["plans"]
            found: dict[float, Nats] = {
                float(row["predicted"]): {m: float(x) for m, x in row["nats"].items()} for row in rows
            }
            for predicted, nats in found.items():
                if not 0 < predicted < math.inf or not all(0 <= x < math.inf for x in nats.values()):
                    raise ValueError(f"of a predicted loss of {predicted} it has {nats}")
                if not nats or nats.keys() != next(iter(found.values())).keys():
                    raise ValueError("not all plans have the same modalities")
            return found
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StatisticsError(f"{self._path} is damaged ({error}); remove it and measure again") from error

    def __bool__(self) -> bool:
        return bool(self._found)

    def __contains__(self, predicted: float) -> bool:
        return predicted in self._found

    def add(self, predicted: float, nats: Nats) -> None:
        """Keep what a plan of this predicted loss was found to cost. Raises StatisticsError if it cannot be written."""
        self._found = dict(sorted({**self._read(), **self._found, predicted: nats}.items()))
        rows = [{"predicted": one, "nats": dict(found)} for one, found in self._found.items()]
        with writing(self._directory, alone=False):
            self._path.parent.mkdir(exist_ok=True)
            write_whole(self._path, (json.dumps({"plans": rows}, indent=2) + "\n").encode())

    def at(self, predicted: float) -> dict[str, float]:
        """What a plan of this predicted loss, nats in the recipe's metric, costs each modality.

        Between two that were measured, logarithms lie on a line; beyond them costs grow as predictions do. Where
        embedding and output head are rounded in any case, less than the least that was measured is not told.
        """
        every = list(self._found.values())
        if self._rounds_tables:
            predicted = max(predicted, next(iter(self._found)))
        if predicted <= 0:
            return dict.fromkeys(every[0], 0.0)
        known, x = np.log(list(self._found)), np.log(predicted)
        beyond = x - np.clip(x, known[0], known[-1])

        def cost(modality: str) -> float:
            costs = np.log([max(nats[modality], _LEAST) for nats in every])
            return float(np.exp(np.interp(x, known, costs) + beyond))

        return {modality: cost(modality) for modality in every[0]}
