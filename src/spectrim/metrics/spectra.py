"""Spectra on disk: written once per model, metric and statistics; a budget takes the first directions of each."""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from spectrim.anatomy import Anatomy
from spectrim.away import values
from spectrim.calibrate import Statistics
from spectrim.disk.lock import writing
from spectrim.disk.sealed import Sealed, open_sealed, write_sealed
from spectrim.errors import NumericalError
from spectrim.linear import Linear
from spectrim.maths.decompose import Directions, Rank, decompose
from spectrim.maths.roots import check_finite
from spectrim.metrics.metric import layer_metric
from spectrim.recipe import MetricPart

logger = logging.getLogger(__name__)

VERSION = 6  # raised when the meaning of a spectrum changes; earlier files are then not used


class Spectra:
    """The spectra of all linears of one model, one file each; directions are kept in float32."""

    def __init__(self, directory: Path, sources: dict[str, str]) -> None:
        self.directory = directory
        self.sources = sources  # by linear: where its metric came from (see Metric.source)
        self._spectra: dict[str, KeptSpectrum] = {}

    def spectrum(self, name: str) -> "KeptSpectrum":
        """The spectrum of one linear; its vectors are read once, for every budget asks for them."""
        if name not in self._spectra:
            self._spectra[name] = KeptSpectrum(lambda: self._open(name))
        return self._spectra[name]

    def _open(self, name: str) -> Sealed:
        return open_sealed(self.directory / f"{name}.safetensors", of=_of(self.directory, name))


class KeptSpectrum(Directions):
    """A spectrum whose directions are read from its file whenever they are asked for."""

    def __init__(self, open_file: Callable[[], Sealed]) -> None:
        self._open = open_file
        self._checked = False  # whether the directions were compared with their digests
        file = open_file()
        vectors = {key: file.tensor(key) for key in file.digests.keys() - {"P", "Q"}}
        self.s, self.loss, self.head = vectors["s"], vectors.get("loss"), vectors.get("head")

    def sides(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """P and Q as they were stored. Raises StatisticsError where they cannot be read."""
        file = self._open()
        P, *rest = (file.tensor(key, checked=self._checked) for key in ("P", "Q") if key in file.digests)
        self._checked = True
        return P, rest[0] if rest else None

    def directions(
        self, rank: Rank, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As those of a spectrum in memory, contiguous."""
        s, P, Q = super().directions(rank, device)
        return s, P.contiguous(), None if Q is None else Q.contiguous()


def cache_key(metric: MetricPart, statistics: Statistics | None, parts: Anatomy) -> str:
    """The name of the spectra of a metric and statistics; statistics are of one model, so they stand for it."""
    state = None if statistics is None else statistics.manifest.model_dump(mode="json")
    linears = [asdict(linear) | {"dtype": str(linear.dtype)} for linear in parts.linears]
    content = [VERSION, metric.model_dump(mode="json"), state, linears]
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

    One linear at a time is in memory; files appear whole, so a killed run goes on where it stopped, and several may run
    side by side.

    Raises:
        NumericalError: a weight or a moment holds NaN or infinity; names the linear.
        RecipeError: the statistics lack what the metric needs.
        StatisticsError: a file cannot be written, or not be read.
    """
    paths = {linear.name: directory / f"{linear.name}.safetensors" for linear in parts.linears}
    sources: dict[str, str] = {}
    there = sum(path.exists() for path in paths.values())
    if there:
        state = "complete already" if there == len(paths) else f"resuming after linear {there} of {len(paths)}"
        logger.info("decompose: %s", state)
    made = there
    if progress is not None:
        progress(made, len(paths))
    with ExitStack() as stack:
        if there < len(paths):
            stack.enter_context(writing(directory if statistics is None else statistics.path, alone=False))
        for linear in parts.linears:
            path, of = paths[linear.name], _of(directory, linear.name)
            if not path.exists():
                tensors, source = _make(model, linear, metric, statistics)
                write_sealed(path, tensors, of=of, note=source)
                made += 1
                if progress is not None:
                    progress(made, len(paths))
            sources[linear.name] = open_sealed(path, of=of).note
    return Spectra(directory, sources)


def _of(directory: Path, name: str) -> str:
    """What identifies a file: the key, which stands for all that its spectrum depends on, and the linear."""
    return f"{directory.name}/{name}"


def _make(
    model: nn.Module, linear: Linear, part: MetricPart, statistics: Statistics | None
) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of one spectrum, and where its metric came from."""
    W = check_finite(f"the weight of {linear.name}", values(model.get_submodule(linear.name)))
    if not W.any():
        logger.warning("%s: all weights are zero; was it ever trained?", linear.name)
    metric = layer_metric(part, linear, statistics, W.device)
    try:
        spectrum = decompose(W, metric.value, metric.output, linear.per_head or 1 if part.per_head else 1)
    except NumericalError as error:
        raise NumericalError(f"{linear.name}: {error}") from error
    check_finite(f"the spectrum of {linear.name}", spectrum.s)
    # A projection on the inputs holds roots of the input metric, whose columns differ in size: it keeps its precision.
    kept = torch.float64 if len(spectrum.P) < len(W) and spectrum.head is None else torch.float32
    tensors = {"s": spectrum.s, "loss": spectrum.loss, "head": spectrum.head, "P": spectrum.P.to(kept)}
    tensors["Q"] = None if spectrum.Q is None else spectrum.Q.to(kept)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, metric.source
