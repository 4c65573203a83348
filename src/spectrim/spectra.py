"""Spectra on disk: written once per model, metric and statistics; every budget afterwards is a slice."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from spectrim.anatomy import Anatomy, Linear
from spectrim.calibrate import Statistics
from spectrim.decompose import Spectrum, decompose
from spectrim.errors import NumericalError, StatisticsError
from spectrim.files import sync
from spectrim.layers import Rank
from spectrim.linalg import check_finite
from spectrim.metric import layer_metric
from spectrim.recipe import MetricPart

logger = logging.getLogger(__name__)

VERSION = 3  # of what a spectrum means; a change makes earlier files unused


class Spectra:
    """The spectra of all linears of one model, one file each; directions are kept in float32."""

    def __init__(self, directory: Path, sources: dict[str, str]) -> None:
        self.directory = directory
        self.sources = sources  # by linear: where its metric came from (see Metric.source)
        self._summaries: dict[str, dict[str, torch.Tensor]] = {}

    def values(self, name: str) -> torch.Tensor:
        """Squared singular values of one linear, [m] float64."""
        return self._summary(name)["s"]

    def losses(self, name: str) -> torch.Tensor | None:
        """Predicted increase of the loss by each direction of one linear, [m] float64 nats; None without curvature."""
        return self._summary(name).get("loss")

    def heads(self, name: str) -> int:
        """Parts of one linear that are factored apart, 1 for the whole matrix."""
        head = self._summary(name).get("head")
        return 1 if head is None else int(head.max()) + 1

    def rank(self, name: str, count: int) -> Rank:
        """The rank of one linear's first `count` directions: as it is, or by head."""
        head = self._summary(name).get("head")
        return count if head is None else tuple(head[:count].bincount(minlength=self.heads(name)).tolist())

    def directions(
        self, name: str, rank: Rank, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Values [k] float64 and directions P, Q of one linear, as ``decompose.factors`` takes them.

        With a rank by head, the columns are those of one head after another, and P's are zero outside its rows.
        """
        summary = self._summary(name)
        with self._open(name) as file:
            stored = [file.get_slice(key) for key in sorted({"P", "Q"} & set(file.keys()))]
            if isinstance(rank, int):
                s, found = summary["s"][:rank], [part[:, :rank] for part in stored]
            else:
                s, found = _by_head(summary["s"], summary["head"], [part[:, :] for part in stored], rank)
        P, *rest = (columns.to(device) for columns in found)
        return s.to(device), P, rest[0] if rest else None

    def _summary(self, name: str) -> dict[str, torch.Tensor]:
        """The vectors of one linear; read once, for every budget asks for them."""
        if name not in self._summaries:
            with self._open(name) as file:
                wanted = set(file.keys()) - {"P", "Q"}
                self._summaries[name] = {key: file.get_tensor(key) for key in wanted}
        return self._summaries[name]

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        path = self.directory / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise StatisticsError(f"{path} cannot be read ({error}); delete it and compress again") from error


def directions(spectrum: Spectrum, rank: Rank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Values [k] and directions P, Q of a spectrum in memory; as :meth:`Spectra.directions`."""
    found = [spectrum.P] if spectrum.Q is None else [spectrum.P, spectrum.Q]
    if isinstance(rank, int):
        s, found = spectrum.s[:rank], [part[:, :rank] for part in found]
    else:
        assert spectrum.head is not None
        s, found = _by_head(spectrum.s, spectrum.head, found, rank)
    return s, found[0], found[1] if len(found) > 1 else None


def _by_head(
    s: torch.Tensor, head: torch.Tensor, parts: list[torch.Tensor], ranks: tuple[int, ...]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The first directions of each head, one head after another, at their rows of the whole."""
    chosen = torch.cat([(head == number).nonzero()[:count, 0] for number, count in enumerate(ranks)])
    return s[chosen], [_placed(part[:, chosen], head[chosen], len(ranks)) for part in parts]


def _placed(columns: torch.Tensor, head: torch.Tensor, heads: int) -> torch.Tensor:
    """Columns [d, k] of the heads `head` [k] at their rows of the whole, [heads d, k]."""
    placed = columns.new_zeros(heads, *columns.shape)
    placed[head, :, torch.arange(len(head), device=head.device)] = columns.T
    return placed.flatten(0, 1)


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
    found = {"s": spectrum.s, "loss": spectrum.loss, "head": spectrum.head, "P": spectrum.P.to(kept)}
    found["Q"] = None if spectrum.Q is None else spectrum.Q.to(kept)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in found.items() if tensor is not None}
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata={"source": metric.source})
        sync(temporary)
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
