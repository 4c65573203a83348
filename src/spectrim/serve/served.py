"""What a compressed checkpoint says of its layers, by the server's names, and what unpacking some of them costs."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from spectrim.checkpoint.config import SpectrimConfig
from spectrim.checkpoint.names import shortened
from spectrim.errors import CheckpointError
from spectrim.maths.decompose import Rank
from spectrim.maths.rounding import Grid
from spectrim.storage.embedding import IntegerEmbedding

logger = logging.getLogger("spectrim")


class Served:
    """Form and spec of every compressed linear; ranks, pivots and grids of those whose parts a server runs.

    ``unpacked`` counts the bytes that unpacked integers take beyond packed ones, by linear; ``others`` and ``experts``
    count what linears of other forms, and experts by module, take in floats beyond their file. Raises CheckpointError
    where `SpectrimConfig.layers` does.
    """

    def __init__(self, config: SpectrimConfig) -> None:
        tables = {name for name, entry in config.forms.items() if entry["form"] == IntegerEmbedding.name}
        layers = config.layers()
        self.layers = {name: layer for name, layer in layers.items() if name not in tables}
        self.ranks: dict[str, Rank] = dict(config.ranks)
        self.pivoted = set(config.pivoted)
        self.grids = config.grids()  # of the parts of each linear
        self.embeddings: dict[str, Grid] = {name: IntegerEmbedding().grid(layers[name][1]) for name in tables}
        self.runtime = config.runtime
        self.unpacked: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.experts: Counter[str] = Counter()

    def rename(self, renamed: Callable[[str], str]) -> None:
        """Give every linear another name; embeddings keep that of the checkpoint."""
        self.layers = {renamed(name): layer for name, layer in self.layers.items()}
        self.ranks = {renamed(name): rank for name, rank in self.ranks.items()}
        self.pivoted = {renamed(name) for name in self.pivoted}
        self.grids = {renamed(name): parts for name, parts in self.grids.items()}

    def runs(self, name: str) -> bool:
        """Whether a compressed linear is of a form whose parts a server can run one by one."""
        return name in self.ranks or name in self.grids

    def report(self) -> None:
        """Say, once, what this process has had to unpack, and what that costs."""
        for found, text in (
            (
                self.experts,
                "experts of %d layers are unpacked into floats for vLLM's fused kernels, which takes %.1f MB more than "
                "in their file: %s",
            ),
            (
                self.others,
                "%d linears are of forms that vLLM does not run and become dense, which takes %.1f MB more than their "
                "file: %s",
            ),
            (
                self.unpacked,
                "integers of %d linears are unpacked, which takes %.1f MB more memory than packed ones "
                "(docs/serving.md says which stay packed): %s",
            ),
        ):
            if found:
                logger.warning(text, len(found), sum(found.values()) / 1e6, shortened(sorted(found)))
            found.clear()


def check_shape(name: str, found: torch.Tensor, expected: Sequence[int] | None) -> None:
    """Raise CheckpointError where a tensor of the checkpoint has another shape than its linear wants; None: none."""
    if expected is None or tuple(found.shape) != tuple(expected):
        raise CheckpointError(
            f"the checkpoint's {name} has the shape {list(found.shape)} instead of "
            f"{None if expected is None else list(expected)}; copy or compress it again"
        )
