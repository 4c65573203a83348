"""Random matrices, and what decompositions of them are."""

import torch

from spectrim.maths.decompose import Spectrum, factors


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric(size: int, seed: int = 0, decay: float = 1.5) -> torch.Tensor:
    """A positive definite matrix with a decaying spectrum in random directions."""
    M = normal(size, size, seed=seed) * torch.arange(1, size + 1).double() ** -decay
    return M @ M.T


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def ranked(found: Spectrum, W: torch.Tensor, k: int) -> torch.Tensor:
    """The approximation of rank k, as the product of the factors."""
    A, B = factors(W, found.s[:k], found.P[:, :k], None if found.Q is None else found.Q[:, :k])
    return A @ B
