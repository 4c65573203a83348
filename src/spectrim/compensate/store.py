"""Compensated linears on disk: a file for each unit that is done, so that a killed run goes on after it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from spectrim.anatomy import Anatomy
from spectrim.calibrate import Statistics
from spectrim.disk.sealed import Sealed, open_sealed, write_sealed
from spectrim.plan.key import COMPENSATED, made_key
from spectrim.plan.plan import Plan
from spectrim.recipe import Recipe
from spectrim.storage import Tensors


class Store:
    """The linears of one recipe and plan, in the statistics directory."""

    def __init__(self, statistics: Statistics, parts: Anatomy, recipe: Recipe, plan: Plan) -> None:
        self.home = statistics.path
        key = made_key((COMPENSATED,), statistics, parts, recipe, plan.linears, without={"tune"})
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
        file = self._open(unit)
        return {name: _linear(file, name) for name in _names(file)}

    def solved(self, units: Iterable[str]) -> "Solved":
        """The linears of these units, all of them done. Raises StatisticsError as `read`."""
        return Solved({name: partial(self._one, unit, name) for unit in units for name in _names(self._open(unit))})

    def _one(self, unit: str, name: str) -> Tensors:
        return _linear(self._open(unit), name)

    def _open(self, unit: str) -> Sealed:
        return open_sealed(self._path(unit), of=self._of(unit))

    def _path(self, unit: str) -> Path:
        return self.directory / f"{unit}.safetensors"

    def _of(self, unit: str) -> str:
        """What a file is of: the unit, and by the key all that its linears depend on."""
        return f"{self.directory.name}/{unit}"


class Solved(Mapping[str, Tensors]):
    """Compensated linears by name, read when they are asked for: together they may be as large as the model."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensors]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensors:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _names(file: Sealed) -> list[str]:
    """Linears of a file."""
    return list(dict.fromkeys(key.partition(":")[0] for key in file.digests))


def _linear(file: Sealed, name: str) -> Tensors:
    return {key.partition(":")[2]: file.tensor(key) for key in file.digests if key.startswith(f"{name}:")}
