"""From a weight and its metrics to a spectrum, and from directions to two factors (METHODS, section 1)."""

from dataclasses import dataclass

import torch

from spectrim.curvature import OutputMetric
from spectrim.linalg import projection_basis


@dataclass(frozen=True)
class Spectrum:
    """All that any budget needs of one linear; m directions, those that cost most first.

    ``s`` [m] float64: squared singular values of ``L W R``; dropping direction i costs s_i. ``P`` [rows, m] and ``Q``
    [rows, m] make the approximation of rank k, ``Ŵ = P_k Q_kᵀ W`` with ``P = L⁻¹ U``, ``Q = Lᵀ U`` and ``QᵀP = I``;
    ``Q`` is None where it equals ``P``. ``loss`` [m] float64: predicted increase of the loss by dropping direction i,
    in nats; None without an output metric.

    Head by head, ``head`` [m] says whose rows a direction is of, rows are those of one head, and each head's first
    direction comes before all others; None for a whole matrix, whose m is min(out, in).
    """

    s: torch.Tensor
    P: torch.Tensor
    Q: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    head: torch.Tensor | None = None


def decompose(
    W: torch.Tensor, metric: torch.Tensor | None = None, output: OutputMetric | None = None, heads: int = 1
) -> Spectrum:
    """The spectrum of one weight.

    Args:
        W: [out, in], any floating dtype.
        metric: the input metric ``R Rᵀ``: None for the identity, [in] for a diagonal, or [in, in].
        output: the output metric, with as many parts as heads; None for the identity.
        heads: parts of the outputs that are factored apart; 1 for the whole matrix.
    """
    found = [_part(rows, metric, output, number) for number, rows in enumerate(W.double().chunk(heads))]
    if heads == 1:
        return found[0]
    s = torch.cat([part.s for part in found])
    loss = None if output is None else torch.cat([part.loss for part in found if part.loss is not None])
    # The first of each head come first, the others where their turn is.
    urgent = (s if loss is None else loss).clone().view(heads, -1)
    urgent[:, 0] = torch.inf
    order = urgent.flatten().argsort(descending=True, stable=True)
    head = torch.arange(heads, device=W.device).repeat_interleave(len(s) // heads)
    Q = None if output is None else torch.cat([part.P if part.Q is None else part.Q for part in found], dim=1)
    return Spectrum(
        s[order],
        torch.cat([part.P for part in found], dim=1)[:, order],
        None if Q is None else Q[:, order],
        None if loss is None else loss[order],
        head[order],
    )


def _part(W: torch.Tensor, metric: torch.Tensor | None, output: OutputMetric | None, number: int) -> Spectrum:
    root = None if output is None else output.roots[number]
    s, U = projection_basis(W if root is None else root.times(W), metric)
    loss = None if output is None else output.nats[number].to(s.device) * s
    if root is None:
        return Spectrum(s, U, None, loss)
    return Spectrum(s, root.solve(U), root.transposed_times(U), loss)


def factors(
    W: torch.Tensor, s: torch.Tensor, P: torch.Tensor, Q: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the approximation ``P Qᵀ W`` in k directions with values `s` [k]; P and Q (None: P) are [out, k].

    The values are split evenly (JW-SVD, algorithm 1, lines 10 and 11): ``A = P diag(s)^{1/4}`` [out, k],
    ``B = diag(s)^{-1/4} Qᵀ W`` [k, in], float64. Where s vanishes, the norm of the row of ``Qᵀ W`` takes its place, so
    that factors stay finite and of one scale.
    """
    A = P.double()
    B = (A if Q is None else Q.double()).T @ W.double()
    norms = B.norm(dim=1)
    split = torch.where(s > 0, s.sqrt(), norms).sqrt()
    split = torch.where(split > 0, split, torch.ones_like(split))
    return A * split, B / split[:, None]
