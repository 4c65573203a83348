"""Compensated linears on disk: a file for each unit that is done, so that a killed run goes on after it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from spectrim.calibrate import Statistics
from spectrim.errors import StatisticsError
from spectrim.files import write_whole
from spectrim.plan import Plan
from spectrim.recipe import Recipe
from spectrim.stored import Stored

VERSION = 3  # of what the tensors mean; a change makes earlier files unused


class Store:
    """The linears of one recipe and plan, in the statistics directory."""

    def __init__(self, statistics: Statistics, recipe: Recipe, plan: Plan) -> None:
        state = statistics.manifest.model_dump(mode="json")
        parts = [part.model_dump(mode="json") for part in (recipe.metric, recipe.compensate, recipe.quantize)]
        rows = {name: row.model_dump(mode="json", include={"rank", "integers"}) for name, row in plan.linears.items()}
        content = json.dumps([VERSION, *parts, rows, state], sort_keys=True)
        self.directory = statistics.path / "compensated" / hashlib.sha256(content.encode()).hexdigest()[:16]

    def has(self, unit: str) -> bool:
        """Is this unit done?"""
        return self._path(unit).exists()

    def write(self, unit: str, found: Mapping[str, Stored]) -> None:
        """Keep the linears of one unit, by name. Raises StatisticsError where they cannot be written."""
        tensors = {
            f"{name}:{key}": tensor.cpu().contiguous()
            for name, stored in found.items()
            for key, tensor in stored.tensors().items()
        }
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(unit), save(tensors))
        except OSError as error:
            raise StatisticsError(
                f"{self._path(unit)} cannot be written ({error}); free space or copy the statistics elsewhere"
            ) from error

    def read(self, unit: str) -> dict[str, Stored]:
        """The linears of one unit, by name. Raises StatisticsError where they cannot be read."""
        try:
            tensors = load_file(self._path(unit))
        except (OSError, SafetensorError) as error:
            raise StatisticsError(
                f"{self._path(unit)} cannot be read ({error}); delete it and compress again"
            ) from error
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, rest = key.partition(":")
            found.setdefault(name, {})[rest] = tensor
        return {name: Stored.from_tensors(parts) for name, parts in found.items()}

    def _path(self, unit: str) -> Path:
        return self.directory / f"{unit}.safetensors"
