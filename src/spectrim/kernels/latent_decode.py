"""Attention over a key/value cache that keeps latents: the plain reference (docs/methods.md, section 10).

The keys of key/value head h are ``K = z A_kᵀ + b_k`` with z [tokens, r_h] what the cache keeps, normalised and rotated
where the model does so; its values are ``V = z A_vᵀ + b_v``. Keys are rebuilt for one tile of tokens at a time. Values
never are: a softmax sums to one, so ``Σ p V = (Σ p z) A_vᵀ + b_v``, and A_v runs once for each query.

Head h has its own columns of the latents, in order: those of head 0 come first, A_k[0] has as many.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

TILE = 2048  # rebuilt keys at once, of all sequences and heads: 1 MB of float32 at 128 numbers a head
SCORES = 1 << 20  # of all queries under one softmax; at least those of a tile


@dataclass(frozen=True)
class Factors:
    """What `attend` reads of one layer, made once by `of`; in float32 or wider.

    The first ``2 · half`` numbers of a key are rotated against each other, half against half. Here they lie side by
    side, as complex numbers do: ``order`` int64 [D] says which number of a key is where.
    """

    up_k: list[torch.Tensor | None]  # [r_h, D], in this order
    up_v: list[torch.Tensor | None]  # [r_h, D], as they are
    b_k: torch.Tensor | None  # [H, 1, 1, D], in this order
    b_v: torch.Tensor | None  # [H, 1, D]
    norm: torch.Tensor | None  # [D], in this order
    order: torch.Tensor
    half: int

    @classmethod
    def of(
        cls,
        A_k: Sequence[torch.Tensor | None],
        A_v: Sequence[torch.Tensor | None],
        b_k: torch.Tensor | None,
        b_v: torch.Tensor | None,
        norm: torch.Tensor | None,
        *,
        like: torch.Tensor,
        width: int,
        rotated: int,
    ) -> "Factors":
        """Of arguments as `latent_attention` has them, for queries of a dtype, a width, and `rotated` numbers."""
        heads, half, wide = len(A_k), rotated // 2, torch.promote_types(like.dtype, torch.float32)
        order = torch.arange(width, device=like.device)
        order[: 2 * half] = order[: 2 * half].view(2, half).T.flatten()
        return cls(
            [None if A is None else A.to(wide).T[:, order] for A in A_k],
            [None if A is None else A.to(wide).T for A in A_v],
            None if b_k is None else b_k.to(wide).view(heads, 1, 1, width)[..., order],
            None if b_v is None else b_v.to(wide).view(heads, 1, width),
            None if norm is None else norm.to(wide)[order],
            order,
            half,
        )


def latent_decode(
    q: torch.Tensor,
    z_k: torch.Tensor,
    z_v: torch.Tensor,
    A_k: Sequence[torch.Tensor | None],
    A_v: Sequence[torch.Tensor | None],
    *,
    start: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
    window: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """One decode step of one layer: a query for each sequence, whose own token is the last one in the cache.

    Args:
        q: rotated queries [B, Hq, D], of any floating dtype.
        z_k, z_v, A_k, A_v, options: see `latent_attention`; what is seen is said by the following, not by a mask.
        start, length: tokens of sequence b are those in ``start[b] … length[b] − 1``, int [B]; None: 0 and T.
        window: how many last tokens are seen, the query's own among them.

    Returns:
        [B, Hq, D] in the dtype of q; folded, [B, Hq / H · Σ r_h].
    """
    place = torch.arange(z_k.shape[1], device=q.device)
    end = torch.full((len(q), 1), z_k.shape[1], device=q.device) if length is None else length[:, None]
    seen = place < end  # [B, T]
    if start is not None:
        seen = seen & (place >= start[:, None])
    if window is not None:
        seen = seen & (place >= end - window)
    mask = None if start is None and length is None and window is None else seen[:, None]
    found = latent_attention(q[:, :, None], z_k, z_v, A_k, A_v, **options, mask=mask)
    return found[:, 0] if options.get("folded") else found[:, :, 0]


def latent_attention(
    q: torch.Tensor,
    z_k: torch.Tensor,
    z_v: torch.Tensor,
    A_k: Sequence[torch.Tensor | None],
    A_v: Sequence[torch.Tensor | None],
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    b_k: torch.Tensor | None = None,
    b_v: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Attention of S queries of each sequence over latents, under any mask.

    Args:
        q: rotated queries [B, Hq, S, D], of any floating dtype. Query head i reads key/value head ``i // (Hq / H)``.
        z_k, z_v: latents [B, T, Σ r_h], floating or int8, of the H key/value heads.
        A_k, A_v: their H factors, each [D, r_h]; ranks of keys and of values may differ. None where a head's latents
            are its keys or values themselves.
        scaling: by which scores are multiplied.
        cos, sin: of each token's position, [B or 1, T, Drot] with Drot ≤ D; the first Drot numbers of a key are
            rotated, half against half. None where keys are not rotated.
        b_k, b_v: biases [H · D].
        inverse_rms, norm: of keys that are normalised before rotation: one over the root mean square of each key,
            [B, T, H], and the weight [D] by which the result is multiplied.
        scale_k, scale_v: by which int8 latents are multiplied, [B, T, H].
        mask: which tokens a query sees, bool [B or 1, S, T], or what is added to its scores, floating; None: all.
        softcap: c of ``c · tanh(score / c)``.
        folded: stop before A_v and b_v, which whoever reads the result has in its own product.

    Returns:
        [B, Hq, S, D] in the dtype of q; folded, the mean latents ``Σ p z`` of all query heads one after another, which
        have the ranks of their key/value heads, [B, S, Hq / H · Σ r_h]. Sums are in float32 (float64 for float64
        queries). A query that sees nothing gets the bias, or zeros.
    """
    rotated = 0 if cos is None else cos.shape[2]
    turns = None if cos is None or sin is None else turned(cos, sin)
    factors = Factors.of(A_k, A_v, b_k, b_v, norm, like=q, width=q.shape[3], rotated=rotated)
    return attend(q, z_k, z_v, factors, turns=turns, **options)


def attend(
    q: torch.Tensor,
    z_k: torch.Tensor,
    z_v: torch.Tensor,
    factors: Factors,
    *,
    scaling: float,
    turns: torch.Tensor | None = None,
    inverse_rms: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    folded: bool = False,
) -> torch.Tensor:
    """`latent_attention` with factors that were made ready, and cos and sin as `turned` makes them."""
    (batch, queries, steps, width), heads, tokens = q.shape, len(factors.up_k), z_k.shape[1]
    group, wide = queries // heads, torch.promote_types(q.dtype, torch.float32)
    rows = (q.to(wide) * scaling).reshape(batch, heads, group * steps, width).transpose(0, 1)  # of a head's keys
    rows = (rows if turns is None else rows[..., factors.order]).reshape(heads * batch, group * steps, width)
    ranks_k, ranks_v = ([width if up is None else len(up) for up in side] for side in (factors.up_k, factors.up_v))
    tile = min(max(64, TILE // (batch * heads)), tokens)
    span = max(tile, SCORES // (queries * batch * steps))
    found: list[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]] = []  # of each span
    for first in range(0, tokens, span):
        last = min(first + span, tokens)
        parts: list[torch.Tensor] = []
        for begin in range(first, last, tile):
            at = slice(begin, min(begin + tile, last))
            K = _keys(z_k[:, at].split(ranks_k, dim=2), factors, wide)  # [H, B, tile, D]
            if scale_k is not None:
                K *= _by_head(scale_k[:, at]).to(wide)
            if factors.b_k is not None:
                K += factors.b_k
            if inverse_rms is not None:
                K *= _by_head(inverse_rms[:, at]).to(wide)
            if factors.norm is not None:
                K *= factors.norm
            if turns is not None:
                torch.view_as_complex(K[..., : 2 * factors.half].unflatten(3, (-1, 2))).mul_(turns[:, at])
            parts.append(rows @ K.flatten(0, 1).transpose(1, 2))
        scores = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).view(heads, batch, group * steps, -1)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if mask is not None:
            _mask(scores.view(heads, batch, group, steps, -1), mask[:, None, :, first:last])
        top = scores.amax(3, keepdim=True)
        if mask is not None:
            top.clamp_(min=torch.finfo(wide).min)  # nothing seen so far
        weights = scores.sub_(top).exp_()
        total = weights.sum(3, keepdim=True)
        if scale_v is not None:
            weights *= _by_head(scale_v[:, first:last]).transpose(2, 3).to(wide)
        found.append((top, total, _sums(weights, z_v[:, first:last], ranks_v, tile)))
    total, sums = found[0][1:] if len(found) == 1 else _merged(found)
    if mask is not None:
        total.masked_fill_(total == 0, 1.0)
    means = [one / whole for one, whole in zip(sums, total, strict=True)]  # [B, group · S, r_h]
    if folded:
        by_query = [mean.view(batch, group, steps, -1).transpose(1, 2).flatten(2) for mean in means]
        return torch.cat(by_query, dim=2).to(q.dtype)
    output = torch.stack([m if up is None else m @ up for m, up in zip(means, factors.up_v, strict=True)], dim=1)
    if factors.b_v is not None:
        output += factors.b_v
    return output.view(batch, queries, steps, width).to(q.dtype)


def turned(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Complex rotations [B or 1, T, Drot / 2] of cos and sin [B or 1, T, Drot], whose halves are alike."""
    wide, half = torch.promote_types(cos.dtype, torch.float32), cos.shape[2] // 2
    return torch.complex(cos[..., :half].to(wide), sin[..., :half].to(wide))


def _keys(parts: Sequence[torch.Tensor], factors: Factors, dtype: torch.dtype) -> torch.Tensor:
    """Products [H, B, tile, D] of latents [B, tile, r_h] with their factors."""
    K = factors.order.new_empty(len(parts), *parts[0].shape[:2], len(factors.order), dtype=dtype)
    for each, z, up in zip(K, parts, factors.up_k, strict=True):
        if up is None:
            each.copy_(z[..., factors.order])
        else:
            torch.matmul(z.to(dtype), up, out=each)
    return K


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """Numbers of each token and head [B, T, H] as [H, B, T, 1]."""
    return x.permute(2, 0, 1)[..., None]


def _sums(weights: torch.Tensor, z: torch.Tensor, ranks: Sequence[int], tile: int) -> list[torch.Tensor]:
    """Latents [B, T, Σ r_h] of each head summed with weights [H, B, rows, T]: [B, rows, r_h]."""
    if z.dtype == weights.dtype:
        return [w @ part for w, part in zip(weights, z.split(ranks, dim=2), strict=True)]
    found = [weights.new_zeros(*weights.shape[1:3], rank) for rank in ranks]
    for w, part in zip(weights.split(tile, dim=3), z.split(tile, dim=1), strict=True):  # no more in this dtype at once
        for one, of_head, numbers in zip(found, w, part.to(weights.dtype).split(ranks, dim=2), strict=True):
            one += of_head @ numbers
    return found


def _merged(
    found: Sequence[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Totals [H, B, rows, 1] and sums of all spans, by the logarithms of their sums."""
    tops, totals = (torch.stack(each) for each in list(zip(*found, strict=True))[:2])
    shares = (tops - tops.amax(0)).exp()  # [spans, H, B, rows, 1]
    sums = [torch.stack(each) for each in zip(*(one[2] for one in found), strict=True)]  # of each head
    return (totals * shares).sum(0), [(each * shares[:, head]).sum(0) for head, each in enumerate(sums)]


def _mask(scores: torch.Tensor, mask: torch.Tensor) -> None:
    """Hide tokens in place; scores [H, B, group, S, tokens], mask [B or 1, 1, S, tokens]."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores.add_(mask)
