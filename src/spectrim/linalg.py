"""Pure tensor mathematics in float64: symmetric roots and the projection that solves every recipe's problem.

One problem stands behind all recipes: minimise ``‖L (W − Ŵ) R‖²_F`` over matrices Ŵ of rank k. Its solution is a
projection, ``Ŵ = L⁻¹ U_k U_kᵀ L W``, where U are the left singular vectors of ``L W R``. Only the input metric
``R Rᵀ`` is needed; where a root R of it is convenient any root will do, and nothing is inverted but L. So no Cholesky
factor has to exist, and rank-deficient and zero metrics are legal input.
"""

from typing import Protocol

import torch

from spectrim.errors import NumericalError

_ROUNDING = 1e-13  # eigenvalues below this share of the largest are rounding, not directions
_NYSTROM_ROUNDING = 1e-7  # of a core that was summed from float32 products


def check_finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself; NumericalError that names it when it holds NaN or infinity."""
    if not bool(tensor.isfinite().all()):
        raise NumericalError(f"{name} holds NaN or infinity; check the model's weights and the calibration samples")
    return tensor


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
    """A root L [out, out] of a positive definite output metric, ``Lᵀ L = G``; never formed, only applied."""

    def times(self, X: torch.Tensor) -> torch.Tensor:
        """``L X`` of X [out, n]."""

    def transposed_times(self, X: torch.Tensor) -> torch.Tensor:
        """``Lᵀ X`` of X [out, n]."""

    def solve(self, X: torch.Tensor) -> torch.Tensor:
        """``L⁻¹ X`` of X [out, n]."""


class BlockRoot:
    """Cholesky's root of a block-diagonal G, given as its blocks [n, b, b]; one block is a full G.

    Any root gives the same approximation, and Cholesky's is the cheapest. Raises NumericalError where G is not positive
    definite: damp it first.
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        self._factor, failed = torch.linalg.cholesky_ex(blocks)  # lower ℓ with ℓ ℓᵀ = G, so L = ℓᵀ
        if bool(failed.any()):
            raise NumericalError("an output metric is not positive definite; raise metric.damping")

    def _split(self, X: torch.Tensor) -> torch.Tensor:
        return X.reshape(len(self._factor), self._factor.shape[1], -1)

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
    """The root of ``G = diag(d) + V Vᵀ``, d [out] positive and V [out, r], in memory of V's size.

    With ``diag(d)^{-1/2} V`` = Q S Pᵀ it is ``L = (I + Q (√(1 + S²) − 1) Qᵀ) diag(d)^{1/2}``.
    """

    def __init__(self, d: torch.Tensor, V: torch.Tensor) -> None:
        if not bool((d > 0).all()):
            raise NumericalError("an output metric is not positive definite; raise metric.damping")
        self._scale = d.sqrt()[:, None]
        self._Q, S, _ = torch.linalg.svd(V / self._scale, full_matrices=False)
        self._gain = (1 + S.square()).sqrt()[:, None]

    def _stretch(self, X: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return X + self._Q @ ((gain - 1) * (self._Q.T @ X))

    def times(self, X: torch.Tensor) -> torch.Tensor:
        """``L X`` of X [out, n]."""
        return self._stretch(self._scale * X, self._gain)

    def transposed_times(self, X: torch.Tensor) -> torch.Tensor:
        """``Lᵀ X`` of X [out, n]."""
        return self._scale * self._stretch(X, self._gain)

    def solve(self, X: torch.Tensor) -> torch.Tensor:
        """``L⁻¹ X`` of X [out, n]."""
        return self._stretch(X, 1 / self._gain) / self._scale


def nystrom(Y: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """V [out, r] with ``V Vᵀ ≈ G`` for a positive semidefinite G, from its sketch ``Y = G test`` [out, r].

    The Nyström approximation ``Y (testᵀ Y)⁺ Yᵀ``; it never exceeds G, and equals it where G's rank is at most r.
    """
    core = test.T @ Y
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > _NYSTROM_ROUNDING * values[-1].clamp_min(0)
    return Y @ (vectors[:, kept] / values[kept].sqrt())


def _weighted(X: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """``X R Rᵀ`` for an input metric that is the identity (None), a diagonal [in] or a matrix [in, in]."""
    if metric is None:
        return X
    return X * metric if metric.ndim == 1 else X @ metric


def projection_basis(X: torch.Tensor, metric: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The spectrum of ``X R`` from the input metric ``R Rᵀ`` alone.

    Args:
        X: [out, in] float64, the (output-weighted) weight ``L W``.
        metric: ``R Rᵀ``: None for the identity, [in] for a diagonal, or [in, in].

    Returns:
        s [m], the squared singular values of ``X R``, largest first, and U [out, m] with orthonormal columns,
        m = min(out, in): ``‖(X − U_k U_kᵀ X) R‖² = Σ_{i>k} s_i``. Directions that the metric does not see (s = 0)
        come last, ordered by the energy that X itself has in them, so that all m columns reproduce X.
    """
    rows, columns = X.shape
    if rows <= columns:
        s, U = eigh_descending(_weighted(X, metric) @ X.T)
    else:
        R, K = _root_of(metric), X.T @ X
        s, V = eigh_descending(K if R is None else (R[:, None] * K * R if R.ndim == 1 else R.T @ K @ R))
        V = V if R is None else (R[:, None] * V if R.ndim == 1 else R @ V)
    size = min(rows, columns)
    seen = int((s > _ROUNDING * s[:1]).sum())  # s is empty under a zero metric with out > in
    if rows > columns:
        U = _orthonormal(X @ (V[:, :seen] / s[:seen].sqrt()))
        s = torch.cat([s, s.new_zeros(size - len(s))])
    if seen < size:
        U = torch.cat([U[:, :seen], _remainder(X, U[:, :seen], size - seen)], dim=1)
        s = torch.cat([s[:seen], s.new_zeros(size - seen)])
    return s, U


def _root_of(metric: torch.Tensor | None) -> torch.Tensor | None:
    if metric is None:
        return None
    return metric.clamp_min(0).sqrt() if metric.ndim == 1 else root(metric)


def _orthonormal(Y: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns [n, k] with the leading spans of Y, whose columns are nearly orthonormal already.

    The triangular factor of the Gram matrix does it in one pass at the speed of matrix products (CholeskyQR); where
    rounding has left too little of the last columns for that, Householder's QR does.
    """
    factor, failed = torch.linalg.cholesky_ex(Y.T @ Y)
    if int(failed) or float(factor.diagonal().min() if len(factor) else 1) < 0.5:
        return torch.linalg.qr(Y).Q
    return torch.linalg.solve_triangular(factor, Y.T, upper=False).T


def _remainder(X: torch.Tensor, U: torch.Tensor, count: int) -> torch.Tensor:
    """`count` orthonormal columns outside span(U), which hold what U leaves of X, largest energy first."""
    left = X - U @ (U.T @ X)
    vectors = torch.linalg.svd(left, full_matrices=False).U
    # Where X has no more energy its vectors may lean into span(U): a second projection and a QR keep them out.
    candidates = vectors[:, : min(count, vectors.shape[1])]
    joined = torch.linalg.qr(torch.cat([U, candidates - U @ (U.T @ candidates)], dim=1)).Q
    return joined[:, U.shape[1] :]
