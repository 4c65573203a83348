"""From a weight and its metrics to a spectrum, and from directions to two factors (docs/methods.md, section 1)."""

from dataclasses import dataclass
from functools import partial

import torch

from spectrim.maths.roots import OutputRoot, left_basis, right_basis

Rank = int | tuple[int, ...]  # of the whole layer, or of each head (equal groups of outputs)


def head_ranks(rank: Rank) -> tuple[int, ...]:
    """The ranks of all heads; a layer that is factored as a whole counts as one head."""
    return (rank,) if isinstance(rank, int) else rank


@dataclass(frozen=True)
class OutputMetric:
    """The output metric of a linear, whole or head by head.

    ``roots`` [parts] are the roots of G, or of its diagonal blocks by head; None stands for the identity, where no
    gradient reaches the linear. ``nats`` [parts] float64 turns squared error ``‖L(W − Ŵ)R‖²`` of a part into the
    predicted increase of the loss.
    """

    roots: tuple[OutputRoot | None, ...]
    nats: torch.Tensor

    def dense(self, out: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """G [out, out] float64 in nats: zero between heads, and the multiple of the identity that a None stands for."""
        eye = partial(torch.eye, out // len(self.roots), dtype=torch.float64, device=device)
        pairs = zip(self.roots, self.nats.tolist(), strict=True)
        blocks = [nats * (eye() if root is None else root.dense()) for root, nats in pairs]
        return blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks)


class Directions:
    """The slices of a spectrum, wherever its directions are: in memory (:class:`Spectrum`) or in a file.

    ``s`` [m] float64: squared singular values of ``L W R``; dropping direction i costs s_i. ``loss`` [m] float64: the
    predicted increase of the loss by dropping it, in nats; None without an output metric. ``head`` [m]: whose direction
    it is where heads are factored apart, each head's first before all others; None for a whole matrix, whose m is
    min(out, in).
    """

    s: torch.Tensor
    loss: torch.Tensor | None
    head: torch.Tensor | None

    def sides(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """P and Q (see :class:`Spectrum`), all columns of them."""
        raise NotImplementedError

    @property
    def heads(self) -> int:
        """Parts of the outputs that are factored apart, 1 for the whole matrix."""
        return 1 if self.head is None else int(self.head.max()) + 1

    def rank(self, count: int) -> Rank:
        """The rank of the first `count` directions: as it is, or by head."""
        return count if self.head is None else tuple(self.head[:count].bincount(minlength=self.heads).tolist())

    def directions(
        self, rank: Rank, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Values [k] float64 and columns of P and Q, as `factors` takes them.

        With a rank by head, the columns are those of one head after another, and P's are zero outside its rows.
        """
        P, Q = self.sides()
        columns = [P] if Q is None else [P, Q]
        if isinstance(rank, int):
            s, columns = self.s[:rank], [part[:, :rank] for part in columns]
        else:
            assert self.head is not None
            s, columns = by_head(self.s, self.head, columns, rank)
        P, *rest = (part.to(device) for part in columns)
        return s.to(device), P, rest[0] if rest else None


@dataclass(frozen=True)
class Spectrum(Directions):
    """All that any budget needs of one linear; m directions, those that cost most first.

    ``P`` and ``Q`` make the approximation of rank k by a projection on the smaller side of W, with ``QᵀP = I``:
    ``Ŵ = P_k Q_kᵀ W`` where out ≤ in ([out, m], ``P = L⁻¹ U``, ``Q = Lᵀ U``; ``Q`` is None where it equals ``P``), and
    ``Ŵ = W P_k Q_kᵀ`` where out > in ([in, m], see `right_basis`). Head by head, they are [out/heads, m], have the rows
    of the head and project the outputs.
    """

    s: torch.Tensor
    P: torch.Tensor
    Q: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    head: torch.Tensor | None = None

    def sides(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """P and Q."""
        return self.P, self.Q


def decompose(
    W: torch.Tensor, metric: torch.Tensor | None = None, output: OutputMetric | None = None, heads: int = 1
) -> Spectrum:
    """The spectrum of one weight.

    Args:
        W: [out, in], any floating dtype.
        metric: the input metric ``R Rᵀ``: None for the identity, [in] for a diagonal, or [in, in].
        output: the output metric, with as many parts as heads; None for the identity.
        heads: parts of the outputs that are factored separately; 1 for the whole matrix.
    """
    spectra = [
        _part(rows, metric, output, number, output_side=heads > 1)
        for number, rows in enumerate(W.double().chunk(heads))
    ]
    if heads == 1:
        return spectra[0]
    s = torch.cat([part.s for part in spectra])
    loss = None if output is None else torch.cat([part.loss for part in spectra if part.loss is not None])
    # The first direction of each head comes first, then all others by cost.
    urgent = (s if loss is None else loss).clone().view(heads, -1)
    urgent[:, 0] = torch.inf
    order = urgent.flatten().argsort(descending=True, stable=True)
    head = torch.arange(heads, device=W.device).repeat_interleave(len(s) // heads)
    Q = None if output is None else torch.cat([part.P if part.Q is None else part.Q for part in spectra], dim=1)
    return Spectrum(
        s[order],
        torch.cat([part.P for part in spectra], dim=1)[:, order],
        None if Q is None else Q[:, order],
        None if loss is None else loss[order],
        head[order],
    )


def _part(
    W: torch.Tensor, metric: torch.Tensor | None, output: OutputMetric | None, number: int, *, output_side: bool
) -> Spectrum:
    """The spectrum of one head or of the whole; with `output_side`, as a projection on the outputs in any case."""
    G = None if output is None else output.roots[number]
    if W.shape[0] > W.shape[1]:
        s, P, Q = right_basis(W.T @ (W if G is None else G.metric_times(W)), metric)
        if output_side:
            P = W @ P
            Q = P if G is None else G.metric_times(P)
    elif G is None:
        (s, P), Q = left_basis(W, metric), None
    else:
        s, U = left_basis(G.times(W), metric)
        P, Q = G.solve(U), G.transposed_times(U)
    return Spectrum(s, P, Q, None if output is None else output.nats[number].to(s.device) * s)


def sides(W: torch.Tensor, P: torch.Tensor, Q: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``Ŵ`` as a product of [out, k] and [k, in] in the dtype of P, from k columns of a spectrum's P and Q."""
    W, Q = W.to(P.dtype), P if Q is None else Q
    return (P, Q.T @ W) if len(P) == len(W) else (W @ P, Q.T)


def factors(
    W: torch.Tensor, s: torch.Tensor, P: torch.Tensor, Q: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors A [out, k] and B [k, in] of the approximation in k directions with values `s` [k], in the dtype of P.

    The values are split evenly (JW-SVD, algorithm 1, lines 10 and 11): ``A = L⁻¹ U diag(s)^{1/4}`` and
    ``B = diag(s)^{-1/4} Uᵀ L W``. Where s vanishes, the norm of the row of ``Uᵀ L W`` takes its place, so that factors
    stay finite and of one scale.
    """
    A, B = sides(W, P, Q)
    norms = B.norm(dim=1)
    split = torch.where(s > 0, s.sqrt(), norms).sqrt()
    split = torch.where(split > 0, split, torch.ones_like(split)).to(A.dtype)
    return A * split, B / split[:, None]


def by_head(
    s: torch.Tensor, head: torch.Tensor, parts: list[torch.Tensor], ranks: tuple[int, ...]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The first directions of each head, one head after another, at their rows of the whole."""
    chosen = torch.cat([(head == number).nonzero()[:count, 0] for number, count in enumerate(ranks)])
    return s[chosen], [_placed(part[:, chosen], head[chosen], len(ranks)) for part in parts]


def _placed(columns: torch.Tensor, head: torch.Tensor, heads: int) -> torch.Tensor:
    """Columns [d, k] of the heads `head` [k] at their rows of the whole, [heads d, k]."""
    placed = columns.new_zeros(heads, *columns.shape)
    placed[head, :, torch.arange(len(head), device=head.device)] = columns.T
    return placed.flatten(0, 1)
