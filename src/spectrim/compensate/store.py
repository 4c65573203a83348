"""Compensated factors on disk: a file for each unit that is done, so that a killed run goes on after it."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from spectrim.calibrate import Statistics
from spectrim.errors import StatisticsError
from spectrim.files import write_whole
from spectrim.plan import Plan
from spectrim.recipe import Recipe

VERSION = 2  # of what the factors mean; a change makes earlier files unused

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [out, k] and B [k, in] of one linear, in its dtype; k is the sum of ranks by head, A zero outside each head."""


class Store:
    """The factors of one recipe and plan, in the statistics directory."""

    def __init__(self, statistics: Statistics, recipe: Recipe, plan: Plan) -> None:
        state = statistics.manifest.model_dump(mode="json")
        parts = [recipe.metric.model_dump(mode="json"), recipe.compensate.model_dump(mode="json")]
        content = json.dumps([VERSION, *parts, plan.ranks, state], sort_keys=True)
        self.directory = statistics.path / "compensated" / hashlib.sha256(content.encode()).hexdigest()[:16]

    def has(self, unit: str) -> bool:
        """Is this unit done?"""
        return self._path(unit).exists()

    def write(self, unit: str, factors: dict[str, Factors]) -> None:
        """Keep the factors of one unit, by linear. Raises StatisticsError where they cannot be written."""
        tensors = {f"{name}.{side}": t.cpu().contiguous() for name, pair in factors.items()
                   for side, t in zip("AB", pair, strict=True)}  # fmt: skip
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(unit), save(tensors))
        except OSError as error:
            raise StatisticsError(
                f"{self._path(unit)} cannot be written ({error}); free space or copy the statistics elsewhere"
            ) from error

    def read(self, unit: str) -> dict[str, Factors]:
        """The factors of one unit, by linear. Raises StatisticsError where they cannot be read."""
        try:
            tensors = load_file(self._path(unit))
        except (OSError, SafetensorError) as error:
            raise StatisticsError(
                f"{self._path(unit)} cannot be read ({error}); delete it and compress again"
            ) from error
        return {name[:-2]: (tensors[name], tensors[f"{name[:-2]}.B"]) for name in tensors if name.endswith(".A")}

    def _path(self, unit: str) -> Path:
        return self.directory / f"{unit}.safetensors"
