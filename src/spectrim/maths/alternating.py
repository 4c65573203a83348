"""adaComp: the two factors fitted in turn to what the dense layer gives (docs/methods.md, section 7); pure tensors."""

import torch

from spectrim.maths.roots import OutputRoot, eigh_descending


def alternate(
    A: torch.Tensor,
    B: torch.Tensor,
    second: torch.Tensor,
    cross: torch.Tensor,
    *,
    rounds: int,
    formed: torch.dtype = torch.float64,
    output: OutputRoot | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors after `rounds` of ``A ← argmin, B ← argmin`` of ``E‖t − A B x'‖²`` (AdaSVD, section 3, adaComp).

    With ``C' = E[x' x'ᵀ]`` and ``T = E[t x'ᵀ]`` a round is ``A = T Bᵀ (B C' Bᵀ)⁺``, ``B = A⁺ T C'⁺``; for inputs of the
    dense model, ``t = W x`` and ``x' = x``, that is ``A = W C Bᵀ (B C Bᵀ)⁺``, ``B = A⁺ W``. Both are taken as steps
    from the factors before: what the samples do not show then stays as it is, and the error falls in every step,
    whatever a pseudo-inverse leaves out.

    Args:
        A: [out, k], any floating dtype.
        B: [k, in], any floating dtype.
        second: C' [in, in] float64.
        cross: T [out, in] float64.
        rounds: τ ≥ 0.
        formed: the precision in which the products of C' and T were formed.
        output: measures the error as ``tr(G E[e eᵀ])`` instead; None for the identity. A does not depend on it.

    Returns:
        A and B in float64.
    """
    A, B = A.double(), B.double()
    inverse = pseudo_inverse(second, formed)
    for _ in range(rounds):
        seen = B @ second  # [k, in]
        A = A + (cross - A @ seen) @ B.T @ pseudo_inverse(seen @ B.T, formed)
        weighted = A if output is None else output.metric_times(A)
        step = weighted.T @ (cross - A @ seen) @ inverse
        B = B + pseudo_inverse(A.T @ weighted) @ step
    return A, B


def pseudo_inverse(M: torch.Tensor, formed: torch.dtype = torch.float64) -> torch.Tensor:
    """A pseudo-inverse [n, n] of a positive semidefinite M [n, n] float64 of any rank, formed in the dtype `formed`.

    Eigenvectors are taken of M with a unit diagonal: channels of very different size, as activations have, then all
    count. Rounding of the entries makes eigenvalues of √n times its size there; those no larger are left out. It is
    Moore and Penrose's where M has full rank.
    """
    diagonal = M.diagonal()
    scale = torch.where(diagonal > 0, diagonal.clamp_min(1e-300).rsqrt(), 0.0)
    values, vectors = eigh_descending(scale[:, None] * (M + M.T) / 2 * scale)
    kept = int((values > 4 * torch.finfo(formed).eps * len(M) ** 0.5).sum())
    half = scale[:, None] * vectors[:, :kept] / values[:kept].sqrt()
    return half @ half.T
