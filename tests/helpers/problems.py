"""Problems for forms of storage: a random weight in random metrics, and its error in them."""

import torch

from helpers.matrices import metric, normal
from spectrim.linear import Linear
from spectrim.maths.decompose import OutputMetric
from spectrim.maths.roots import BlockRoot
from spectrim.maths.rounding import error
from spectrim.recipe import QuantizePart, StoragePart
from spectrim.storage import Problem


def problem(
    out: int = 24,
    size: int = 32,
    *,
    seed: int = 0,
    decay: float = 1.5,
    floor: float = 0.01,
    dtype: torch.dtype = torch.float32,
    metrics: str = "both",
    heads: int = 1,
    storage: StoragePart | None = None,
    quantize: QuantizePart | None = None,
    role: str | None = None,
) -> Problem:
    """A weight [out, size] in the dtype; `metrics` are ``none``, ``diagonal``, ``inputs`` alone or ``both``.

    They have decaying spectra in random directions, and the share `floor` of their mean diagonal in all of them.
    """
    narrow = storage is not None and storage.narrow
    role = role or ("q" if heads > 1 else "down" if narrow else "up")
    linear = Linear("a", "backbone", None, role, out, size, heads if heads > 1 else None, dtype)

    def random(size: int, seed: int) -> torch.Tensor:
        M = metric(size, seed, decay)
        return M + floor * M.diagonal().mean() * torch.eye(size, dtype=M.dtype)

    W, C = normal(out, size, seed=seed).to(dtype), random(size, seed + 1)
    G = [random(out // heads, seed + 2 + head) for head in range(heads)]
    nats = torch.linspace(0.5, 2.0, heads, dtype=torch.float64)
    output = OutputMetric(tuple(BlockRoot(X[None]) for X in G), nats) if metrics == "both" else None
    given = {"none": None, "diagonal": C.diagonal()}.get(metrics, C)
    parts = storage or StoragePart(), quantize or QuantizePart()
    return Problem(linear, lambda: W, lambda: (given, output), *parts, heads=heads)


def lost(problem: Problem, stored: torch.Tensor) -> float:
    """The error of a stored weight [out, size] in the metrics of the problem, in nats where it has an output metric."""
    return error(problem.W.double() - stored.double(), problem.C, problem.G)
