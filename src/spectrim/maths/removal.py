"""Which inputs of a weight it can do without, and the weight on the others (docs/methods.md, section 12)."""

from dataclasses import dataclass

import torch

from spectrim.errors import NumericalError
from spectrim.maths.roots import finite, solved, times_metric

DAMPING = 1e-6  # of the metric, as a share of the mean of its diagonal: what sums in float32 may lack of being positive
_TRIES = 5  # with ten times the dampening each
_DENSE = 0.75  # share of inputs that are left, below which the others are cut out of what is worked on
STEPS = 64  # in which units are removed: those of one step together


@dataclass(frozen=True)
class Removal:
    """``order`` int64 [in] has the inputs, the first that goes first.

    ``error`` float64 [in + 1] is that of the weight, fitted again, after 0, 1, … of them.
    """

    order: torch.Tensor
    error: torch.Tensor

    def kept(self, count: int) -> torch.Tensor:
        """The last `count` inputs to go, ascending; int64 [count]."""
        return self.order[len(self.order) - count :].sort().values


def removal(
    W: torch.Tensor, C: torch.Tensor | None = None, G: torch.Tensor | None = None, damping: float = DAMPING
) -> Removal:
    """The order in which inputs of W [out, in] are removed, those that cost least with the others fitted again first.

    With the inverse P of the metric C of those inputs that are left, and the weight V fitted to them, the removal of
    inputs g costs ``tr(G V_g (P_gg)⁻¹ V_gᵀ)``, after which ``V ← V − V_g (P_gg)⁻¹ P_g`` and the same of P (as in
    optimal brain surgery; Hassibi and Stork 1993). The inputs of one step, a 64th of all, are those of the least cost
    one by one; inside a step the error rises evenly.

    Args:
        W: [out, in], any floating dtype.
        C: metric of the inputs: None for the identity, [in] for a diagonal, or [in, in].
        G: metric of the outputs [out, out]; None for the identity.
        damping: share of the mean of C's diagonal that is added to the diagonal, here and in errors.

    Raises:
        NumericalError: C is not positive definite with this dampening.
    """
    V, size = W.double().clone(), W.shape[1]
    P = _inverse(C, size, V, damping)
    GV = V.clone() if G is None else G @ V
    left, gone, error = torch.arange(size, device=W.device), list[torch.Tensor](), [0.0]
    alive = torch.ones(size, dtype=torch.bool, device=W.device)
    for start in range(0, size, every := max(1, size // STEPS)):
        step = min(every, size - start)
        costs = (GV * V).sum(0) / P.diagonal()
        taken = costs.where(alive, torch.inf).argsort()[:step]
        moved = torch.linalg.solve(P[taken[:, None], taken], torch.cat([P[taken], V[:, taken].T], 1))
        across, inner = moved.split((len(left), len(V)), dim=1)
        cost = max(0.0, float((GV[:, taken].T * inner).sum()))
        error += [error[-1] + cost * (n + 1) / step for n in range(step)]
        gone.append(left[taken])
        for M in (V, GV, P):  # whose columns of these inputs become zero, as do the rows of P
            M.addmm_(M[:, taken], across, alpha=-1)
        alive[taken] = False
        if int(alive.sum()) < _DENSE * len(alive):
            rest = alive.nonzero()[:, 0]
            left, V, GV, P, alive = left[rest], V[:, rest], GV[:, rest], P[rest[:, None], rest], alive[rest]
    return Removal(torch.cat(gone), torch.tensor(error, dtype=torch.float64))


def fitted(
    W: torch.Tensor, kept: torch.Tensor, C: torch.Tensor | None = None, damping: float = DAMPING
) -> torch.Tensor:
    """The weight [out, k] on the inputs `kept` [k] of least error in the metric C, whatever that of the outputs.

    ``W_S + W_R C_RS C_SS⁻¹`` with R the inputs that are not kept; float64. Inputs that C does not see keep their
    columns. `damping` and what is raised are those of `removal`.
    """
    W = W.double()
    if C is None or C.ndim == 1:
        return W[:, kept]
    rest = W.index_fill(1, kept, 0)
    factor = _dampened(C[kept[:, None], kept], C, damping)
    return W[:, kept] + solved(times_metric(rest, C)[:, kept], factor)


def _inverse(C: torch.Tensor | None, size: int, like: torch.Tensor, damping: float) -> torch.Tensor:
    if C is None:
        return torch.eye(size, dtype=like.dtype, device=like.device)
    if C.ndim == 1:
        return torch.diag(1 / (C + _ridge(C, damping)))
    return torch.cholesky_inverse(_dampened(C.clone(), C, damping))


def _dampened(M: torch.Tensor, C: torch.Tensor, damping: float) -> torch.Tensor:
    """The Cholesky factor of M, a part of C, which is overwritten; with more dampening where rounding asks for it."""
    ridge = added = _ridge(C, damping)
    for _ in range(_TRIES):
        M.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(M)
        if not int(failed) and finite(factor):
            return factor
        ridge, added = 10 * ridge, 9 * ridge
    raise NumericalError("the metric of the units is not positive definite; check the moments")


def _ridge(C: torch.Tensor, damping: float) -> torch.Tensor:
    diagonal = C if C.ndim == 1 else C.diagonal()
    return (damping * diagonal.mean()).clamp_min(1e-300)
