"""Spectra on disk: written once per model, metric and statistics; every budget afterwards is a slice."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from spectrim.anatomy import Anatomy, Linear
from spectrim.calibrate import Statistics
from spectrim.decompose import Spectrum, decompose
from spectrim.errors import StatisticsError
from spectrim.linalg import check_finite
from spectrim.metric import input_metric
from spectrim.recipe import MetricPart

VERSION = 1  # of what a spectrum means; a change makes earlier files unused


class Spectra:
    """The spectra of all linears of one model, one file each; directions are kept in float32."""

    def __init__(self, directory: Path, sources: dict[str, str]) -> None:
        self.directory = directory
        self.sources = sources  # by linear: where its metric came from (see InputMetric.source)

    def values(self, name: str) -> torch.Tensor:
        """Squared singular values of one linear, [m] float64."""
        return self._read(name, None)[0]

    def directions(self, name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `rank` values [k] float64 and directions [out, k] float32 of one linear."""
        s, U = self._read(name, rank)
        return s[:rank], U

    def _read(self, name: str, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        path = self.directory / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor("s"), file.get_slice("U")[:, : rank or 1]
        except (OSError, SafetensorError) as error:
            raise StatisticsError(f"{path} cannot be read ({error}); delete it and compress again") from error


def cache_key(metric: MetricPart, statistics: Statistics | None, parts: Anatomy) -> str:
    """Names the spectra that a metric and statistics give; the statistics are of one model, so they stand for it."""
    state = None if statistics is None else statistics.manifest.model_dump(mode="json")
    content = [VERSION, metric.model_dump(mode="json"), state, [linear.name for linear in parts.linears]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def make_spectra(
    model: nn.Module,
    parts: Anatomy,
    metric: MetricPart,
    statistics: Statistics | None,
    directory: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Spectra:
    """Decompose every linear of `model`, or open what an earlier call left complete in `directory`.

    One linear at a time is in memory; files appear whole, so a killed run goes on where it stopped.

    Raises:
        NumericalError: a weight or a moment holds NaN or infinity; names the linear.
        RecipeError: the statistics lack what the metric needs.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StatisticsError(
            f"{directory} cannot be made ({error}); copy the statistics to a folder of yours"
        ) from error
    sources: dict[str, str] = {}
    for done, linear in enumerate(parts.linears):
        path = directory / f"{linear.name}.safetensors"
        if path.exists():
            sources[linear.name] = _source(path)
        else:
            sources[linear.name] = _make(model, linear, metric, statistics, path)
        if progress is not None:
            progress(done + 1, len(parts.linears))
    return Spectra(directory, sources)


def _make(model: nn.Module, linear: Linear, part: MetricPart, statistics: Statistics | None, path: Path) -> str:
    weight = model.get_submodule(linear.name).weight
    assert isinstance(weight, torch.Tensor)
    W = check_finite(f"the weight of {linear.name}", weight.detach())
    metric = input_metric(part, linear, statistics)
    value = None if metric.value is None else metric.value.to(W.device)
    spectrum: Spectrum = decompose(W, value)
    check_finite(f"the spectrum of {linear.name}", spectrum.s)
    tensors = {"s": spectrum.s.cpu(), "U": spectrum.U.float().cpu().contiguous()}
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata={"source": metric.source})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise StatisticsError(f"{path} cannot be written ({error}); free space or name another directory") from error
    return metric.source


def _source(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            return str(file.metadata()["source"])
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise StatisticsError(f"{path} cannot be read ({error}); delete {path.parent} and compress again") from error
