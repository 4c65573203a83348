"""From a weight and its metrics to a spectrum, and from a spectrum and a rank to two factors (METHODS, section 1)."""

from dataclasses import dataclass

import torch

from spectrim.linalg import projection_basis


@dataclass(frozen=True)
class Spectrum:
    """All that any budget needs of one linear.

    ``s`` [m] float64: squared singular values of ``L W R``, largest first; dropping direction i costs s_i.
    ``U`` [out, m]: the orthonormal directions, in the coordinates of ``L``. m = min(out, in).
    """

    s: torch.Tensor
    U: torch.Tensor


def decompose(W: torch.Tensor, metric: torch.Tensor | None = None, L: torch.Tensor | None = None) -> Spectrum:
    """The spectrum of one weight.

    Args:
        W: [out, in], any floating dtype.
        metric: the input metric ``R Rᵀ``: None for the identity, [in] for a diagonal, or [in, in].
        L: the root [out, out] of the output metric; None for the identity.
    """
    X = W.double() if L is None else L @ W.double()
    return Spectrum(*projection_basis(X, metric))


def factors(
    W: torch.Tensor,
    U: torch.Tensor,
    s: torch.Tensor,
    L: torch.Tensor | None = None,
    L_inverse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the best approximation in the directions `U` [out, k] with values `s` [k].

    The values are split evenly (JW-SVD, algorithm 1, lines 10 and 11): ``A = L⁻¹ U diag(s)^{1/4}`` [out, k],
    ``B = diag(s)^{-1/4} Uᵀ L W`` [k, in], float64. Where s vanishes, the norm of the row of ``Uᵀ L W`` takes its place,
    so that factors stay finite and of one scale.
    """
    U = U.double()
    A, B = U, U.T @ (W.double() if L is None else L @ W.double())
    norms = B.norm(dim=1)
    split = torch.where(s > 0, s.sqrt(), norms).sqrt()
    split = torch.where(split > 0, split, torch.ones_like(split))
    A, B = A * split, B / split[:, None]
    return (A if L_inverse is None else L_inverse @ A), B
