"""Compensated linears on disk: a file for each unit that is done, so that a killed run goes on after it."""

from collections.abc import Mapping
from pathlib import Path

import torch

from spectrim.anatomy import Anatomy
from spectrim.calibrate import Statistics
from spectrim.disk.sealed import open_sealed, write_sealed
from spectrim.plan.key import made_key
from spectrim.plan.plan import Plan
from spectrim.recipe import Recipe
from spectrim.storage import Tensors

VERSION = 8  # of what the tensors mean; a change makes earlier files unused


class Store:
    """The linears of one recipe and plan, in the statistics directory."""

    def __init__(self, statistics: Statistics, parts: Anatomy, recipe: Recipe, plan: Plan) -> None:
        self.home = statistics.path
        key = made_key(VERSION, statistics, parts, recipe, plan.linears, without={"tune"})
        self.directory = self.home / "compensated" / key

    def has(self, unit: str) -> bool:
        """Is this unit done?"""
        return self._path(unit).exists()

    def write(self, unit: str, found: Mapping[str, Tensors]) -> None:
        """Keep the linears of one unit, by name. Raises StatisticsError where they cannot be written."""
        tensors = {f"{name}:{key}": tensor for name, one in found.items() for key, tensor in one.items()}
        write_sealed(self._path(unit), tensors, of=self._of(unit))

    def read(self, unit: str) -> dict[str, Tensors]:
        """The linears of one unit, by name. Raises StatisticsError where they cannot be read."""
        file = open_sealed(self._path(unit), of=self._of(unit))
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key in file.digests:
            name, _, rest = key.partition(":")
            found.setdefault(name, {})[rest] = file.tensor(key)
        return dict(found)

    def _path(self, unit: str) -> Path:
        return self.directory / f"{unit}.safetensors"

    def _of(self, unit: str) -> str:
        """What a file is of: the unit, and by the key all that its linears depend on."""
        return f"{self.directory.name}/{unit}"
