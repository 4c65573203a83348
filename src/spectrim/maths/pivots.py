"""Pivoted factors: a matrix of rank k from k of its rows and coefficients of the others (docs/methods.md, section 5).

``Ŵ = A B`` with A [out, k] and B [k, in] has freedom to spare: every invertible T gives ``(A T)(T⁻¹ B)``. With
``T⁻¹ = A[p]`` for k independent rows p of A, the rows p of the first factor are the identity, which needs no storage:
``Ŵ[p] = B'`` and ``Ŵ[¬p] = A' B'``, k (in + out − k) numbers in place of k (in + out).
"""

import torch

from spectrim.maths.roots import check_finite

BOUND = 1.2  # largest |entry| of A'; tighter bounds amplify less rounding, and take more swaps
_BLOCK = 256  # rows and columns of A' among which swaps are looked for at once


def pivoted(A: torch.Tensor, B: torch.Tensor, bound: float = BOUND) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(p, A', B')`` with ``(A B)[p] = B'`` and ``(A B)[¬p] = A' B'``; exact up to rounding, for any rank of A.

    LU with partial pivoting of A finds k rows whose coefficients A' are small in practice; rows are then swapped, as in
    strong rank-revealing factorizations (Gu and Eisenstat 1996) and maximum-volume submatrices (Goreinov et al. 2010),
    until no entry exceeds the bound. A' = L₂ L₁⁻¹ does not contain U, so an A of lower rank is no special case.

    Args:
        A: [out, k], k ≤ out, any floating dtype.
        B: [k, in].
        bound: largest absolute value of an entry of A', above 1.

    Returns:
        The pivots p, int64 [k], ascending; A' [out − k, k] by the other rows, ascending, and B' [k, in], float64.

    Raises:
        NumericalError: A or B holds NaN or infinity.
    """
    A, B = check_finite("the factor A", A).double(), check_finite("the factor B", B).double()
    k = A.shape[1]
    LU, exchanges, _ = torch.linalg.lu_factor_ex(A)  # a zero pivot, which it would report, leaves L bounded
    X = torch.linalg.solve_triangular(LU[:k], LU[k:], upper=False, left=False, unitriangular=True)
    order = list(range(len(A)))
    for i, j in enumerate(exchanges.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    rows = torch.tensor(order, device=A.device)
    p, others = rows[:k], rows[k:]
    while True:
        size = X.abs()
        high, wide = size.amax(1) if k else size.sum(1), size.amax(0) if len(X) else size.sum(0)
        if not bool((high > bound).any()):
            break
        I = high.topk(min(_BLOCK, int((high > bound).sum()))).indices  # noqa: E741
        J = wide.topk(min(_BLOCK, int((wide > bound).sum()))).indices
        chosen = _swaps(X[I][:, J], bound)
        I, J = I[chosen[:, 0]], J[chosen[:, 1]]  # noqa: E741
        _swap(X, I, J)
        p[J], others[I] = others[I], p[J]
    p, columns = p.sort()
    return p, X[others.argsort()][:, columns], A[p] @ B


def _swaps(S: torch.Tensor, bound: float) -> torch.Tensor:
    """Rows and columns of S to swap, [m, 2]: what swapping the largest entry again and again would choose.

    A swap takes the others' entries to their Schur complement, so this is elimination with complete pivoting. Each
    swap multiplies the volume of the pivot rows by more than `bound`, so that they come to an end.
    """
    S = S.cpu().clone()
    swaps: list[tuple[int, int]] = []
    while len(swaps) < min(S.shape):
        i, j = divmod(int(S.abs().argmax()), S.shape[1])
        if not abs(float(S[i, j])) > bound:
            break
        swaps.append((i, j))
        S -= torch.outer(S[:, j], S[i]) / S[i, j]
    return torch.tensor(swaps)


def _swap(X: torch.Tensor, I: torch.Tensor, J: torch.Tensor) -> None:  # noqa: E741
    """Coefficients X [out − k, k] after the rows I have changed places with the pivots J; in place (Woodbury)."""
    R = X[I]  # [m, k]
    E = torch.zeros_like(R)
    E[torch.arange(len(J)), J] = 1
    X[I] = E
    X.addmm_(X[:, J], torch.linalg.solve(R[:, J], R - E), alpha=-1)


def row_order(pivots: torch.Tensor, out: int) -> torch.Tensor:
    """Which row of Ŵ each row of ``[B'; A' B']`` is, int64 [out], for pivots [k] of any integer dtype.

    Raises ValueError for pivots that are not k different rows.
    """
    p = pivots.long()
    free = torch.ones(out, dtype=torch.bool, device=p.device)
    if bool(((p < 0) | (p >= out)).any()):
        raise ValueError(f"pivots are rows 0 to {out - 1}")
    free[p] = False
    if int(free.sum()) != out - len(p):
        raise ValueError("pivots repeat a row")
    return torch.cat([p, free.nonzero()[:, 0]])
