"""Pure tensor mathematics in float64: symmetric roots and the projection that solves every recipe's problem.

One problem stands behind all recipes: minimize ``‖L (W − Ŵ) R‖²_F`` over matrices Ŵ of rank k. Its solution is a
projection, ``Ŵ = L⁻¹ U_k U_kᵀ L W``, where U are the left singular vectors of ``L W R``. Only the input metric
``R Rᵀ`` is needed; where a root R of it is convenient any root will do, and nothing is inverted but L. So no Cholesky
factor has to exist, and rank-deficient and zero metrics are legal input.
"""

from functools import cached_property
from typing import Protocol

import torch

from spectrim.errors import NumericalError

_ROUNDING = 1e-13  # eigenvalues below this share of the largest are rounding, not directions
_NYSTROM_ROUNDING = 1e-7  # of a core that was summed from float32 products


def finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; told without a copy, since a metric may be gigabytes."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def check_finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself; NumericalError that names it when it holds NaN or infinity."""
    if not finite(tensor):
        raise NumericalError(f"{name} holds NaN or infinity; check the model's weights and the calibration samples")
    return tensor


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in at least float32, the precision in which products are formed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def eigh_descending(M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [n], largest first and clamped at zero, and eigenvectors [n, n] of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(M)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def root(C: torch.Tensor) -> torch.Tensor:
    """A factor R [n, r] with ``R Rᵀ = C`` for a positive semidefinite C [n, n].

    Cholesky's factor where there is one, which is an order of magnitude faster than eigenvectors and as exact a root;
    for a C of numerical rank r < n the clamped eigendecomposition.
    """
    factor, failed = torch.linalg.cholesky_ex(C)
    if not int(failed):
        return factor
    values, vectors = eigh_descending(C)
    rank = int((values > _ROUNDING * values[0]).sum())
    return vectors[:, :rank] * values[:rank].sqrt()


class OutputRoot(Protocol):
    """A positive definite output metric G [out, out] and a root of it, ``Lᵀ L = G``; neither is formed, only applied.

    Any root gives the same approximation. It is taken when it is first asked for: the projection of a weight with more
    outputs than inputs needs none.
    """

    def dense(self) -> torch.Tensor:
        """G itself."""

    def metric_times(self, X: torch.Tensor) -> torch.Tensor:
        """``G X`` of X [out, n]."""

    def times(self, X: torch.Tensor) -> torch.Tensor:
        """``L X`` of X [out, n]."""

    def transposed_times(self, X: torch.Tensor) -> torch.Tensor:
        """``Lᵀ X`` of X [out, n]."""

    def solve(self, X: torch.Tensor) -> torch.Tensor:
        """``L⁻¹ X`` of X [out, n]."""


class BlockRoot:
    """A block-diagonal G, given as its blocks [n, b, b]; one block is a full G. Its root is Cholesky's.

    Raises NumericalError at the first use of the root where G is not positive definite: add dampening first.
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        self._blocks = blocks

    @cached_property
    def _factor(self) -> torch.Tensor:
        factor, failed = torch.linalg.cholesky_ex(self._blocks)  # lower ℓ with ℓ ℓᵀ = G, so L = ℓᵀ
        if bool(failed.any()):
            raise NumericalError("an output metric is not positive definite; raise metric.damping")
        return factor

    def _split(self, X: torch.Tensor) -> torch.Tensor:
        return X.reshape(len(self._blocks), self._blocks.shape[1], -1)

    def dense(self) -> torch.Tensor:
        """G itself, [out, out]."""
        return self._blocks[0] if len(self._blocks) == 1 else torch.block_diag(*self._blocks)

    def metric_times(self, X: torch.Tensor) -> torch.Tensor:
        """``G X`` of X [out, n]."""
        return (self._blocks @ self._split(X)).reshape(X.shape)

    def times(self, X: torch.Tensor) -> torch.Tensor:
        """``L X`` of X [out, n]."""
        return (self._factor.mT @ self._split(X)).reshape(X.shape)

    def transposed_times(self, X: torch.Tensor) -> torch.Tensor:
        """``Lᵀ X`` of X [out, n]."""
        return (self._factor @ self._split(X)).reshape(X.shape)

    def solve(self, X: torch.Tensor) -> torch.Tensor:
        """``L⁻¹ X`` of X [out, n]."""
        return torch.linalg.solve_triangular(self._factor.mT, self._split(X), upper=True).reshape(X.shape)


class LowRankRoot:
    """``G = diag(d) + V Vᵀ``, d [out] positive and V [out, r], in memory of V's size.

    With ``diag(d)^{-1/2} V`` = Q S Pᵀ its root is ``L = (I + Q (√(1 + S²) − 1) Qᵀ) diag(d)^{1/2}``. Raises
    NumericalError at the first use of the root for a d that is not positive: add dampening first.
    """

    def __init__(self, d: torch.Tensor, V: torch.Tensor) -> None:
        self._d, self._V = d[:, None], V

    @cached_property
    def _factor(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Q [out, r] and √(1 + S²) [r, 1]."""
        if not bool((self._d > 0).all()):
            raise NumericalError("an output metric is not positive definite; raise metric.damping")
        Q, S, _ = torch.linalg.svd(self._V / self._d.sqrt(), full_matrices=False)
        return Q, (1 + S.square()).sqrt()[:, None]

    def _stretch(self, X: torch.Tensor, power: int) -> torch.Tensor:
        Q, gain = self._factor
        return X + Q @ ((gain**power - 1) * (Q.T @ X))

    def dense(self) -> torch.Tensor:
        """G itself, [out, out]."""
        G = self._V @ self._V.T
        G.diagonal().add_(self._d[:, 0])
        return G

    def metric_times(self, X: torch.Tensor) -> torch.Tensor:
        """``G X`` of X [out, n]."""
        return self._d * X + self._V @ (self._V.T @ X)

    def times(self, X: torch.Tensor) -> torch.Tensor:
        """``L X`` of X [out, n]."""
        return self._stretch(self._d.sqrt() * X, 1)

    def transposed_times(self, X: torch.Tensor) -> torch.Tensor:
        """``Lᵀ X`` of X [out, n]."""
        return self._d.sqrt() * self._stretch(X, 1)

    def solve(self, X: torch.Tensor) -> torch.Tensor:
        """``L⁻¹ X`` of X [out, n]."""
        return self._stretch(X, -1) / self._d.sqrt()


def nystrom(Y: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """V [out, r] with ``V Vᵀ ≈ G`` for a positive semidefinite G, from its sketch ``Y = G test`` [out, r].

    The Nyström approximation ``Y (testᵀ Y)⁺ Yᵀ``; it never exceeds G, and equals it where G's rank is at most r.
    """
    core = test.T @ Y
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > _NYSTROM_ROUNDING * values[-1].clamp_min(0)
    return Y @ (vectors[:, kept] / values[kept].sqrt())


def times_metric(X: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """``X M`` for X [n, in] and a metric M that is the identity (None), a diagonal [in] or a matrix [in, in]."""
    if metric is None:
        return X
    return X * metric if metric.ndim == 1 else X @ metric


def solved(X: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``X M⁻¹`` of X [out, n], from Cholesky's lower factor of M [n, n]; `cholesky_solve` would copy the factor."""
    half = torch.linalg.solve_triangular(factor.T, X, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def left_basis(X: torch.Tensor, metric: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The spectrum of ``X R`` on the side of the outputs, from the input metric ``R Rᵀ`` alone.

    Args:
        X: [out, in] float64, the (output-weighted) weight ``L W``, out ≤ in.
        metric: ``R Rᵀ``: None for the identity, [in] for a diagonal, or [in, in].

    Returns:
        s [out], the squared singular values of ``X R``, largest first, and U [out, out] with orthonormal columns:
        ``‖(X − U_k U_kᵀ X) R‖² = Σ_{i>k} s_i``. Directions that the metric does not see (s = 0) come last, ordered by
        the energy that X itself has in them.
    """
    s, U = eigh_descending(times_metric(X, metric) @ X.T)
    seen = int((s > _ROUNDING * s[0]).sum())
    if seen < len(s):
        _, V = eigh_descending((U[:, seen:].T @ X) @ (X.T @ U[:, seen:]))
        U = torch.cat([U[:, :seen], U[:, seen:] @ V], dim=1)
    return torch.where(torch.arange(len(s), device=s.device) < seen, s, 0.0), U


def right_basis(K: torch.Tensor, metric: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same spectrum on the side of the inputs, from the Gram matrix ``K = Xᵀ X`` [in, in] of an X of any height.

    Returns:
        s [in], and Z and ``Y = K Z`` [in, in] with ``Zᵀ K Z = I``, so that ``X Z`` are the directions U of
        :func:`left_basis` and ``U_k U_kᵀ X = X Z_k Y_kᵀ``. Columns of directions in which X has no energy are zero.
    """
    size = len(K)
    R = None if metric is None else metric.clamp_min(0).sqrt() if metric.ndim == 1 else root(metric)
    s, V = eigh_descending(K if R is None else (R[:, None] * K * R if R.ndim == 1 else R.T @ K @ R))
    # Where the metric sees next to nothing of X, even the largest is rounding. s is empty under a zero metric.
    noise = 0.0 if R is None else torch.finfo(s.dtype).eps * size * K.diagonal().sum() * R.square().sum()
    seen = int((s > (_ROUNDING * s[:1]).clamp_min(noise)).sum())
    Z = V[:, :seen] / s[:seen].sqrt()
    Z = Z if R is None else (R[:, None] * Z if R.ndim == 1 else R @ Z)
    if seen < size:
        # What is left of X after these directions, X (I − Z Yᵀ), by its own energy.
        Y = K @ Z
        energy, V = eigh_descending(K - Y @ Y.T)
        live = int((energy[: size - seen] > _ROUNDING * K.diagonal().sum()).sum())
        unseen = V[:, :live] / energy[:live].sqrt()
        Z = torch.cat([Z, unseen - Z @ (Y.T @ unseen)], dim=1)
    Z = _orthonormal(Z, K, seen)
    Z = torch.cat([Z, Z.new_zeros(size, size - Z.shape[1])], dim=1)
    return torch.cat([s[:seen], s.new_zeros(size - seen)]), Z, K @ Z


def _orthonormal(Z: torch.Tensor, K: torch.Tensor, seen: int) -> torch.Tensor:
    """Z [n, k], nearly orthonormal under K, made so to rounding, with the same leading spans (CholeskyQR).

    Columns after the first `seen` come by descending energy, and end where one is nothing but rounding.
    """
    factor, failed = torch.linalg.cholesky_ex(Z.T @ (K @ Z))
    if 0 < int(failed) <= seen:
        raise NumericalError("a weight and its metric are too ill-conditioned to decompose; check the moments")
    kept = int(failed) - 1 if int(failed) else Z.shape[1]
    return torch.linalg.solve_triangular(factor[:kept, :kept], Z[:, :kept].T, upper=False).T
