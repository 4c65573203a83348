"""Attention over a key/value cache that keeps latents: the plain reference (docs/methods.md, section 10).

The keys of key/value head h are ``K = z A_kᵀ + b_k`` with z [tokens, r_h] what the cache keeps, normalised and rotated
where the model does so; its values are ``V = z A_vᵀ + b_v``. Keys are rebuilt for one tile of tokens at a time. Values
never are: a softmax sums to one, so ``Σ p V = (Σ p z) A_vᵀ + b_v``, and A_v runs once for each query.

Head h has its own columns of the latents, in order: those of head 0 come first, A_k[0] has as many.
"""

from collections.abc import Sequence
from typing import Any

import torch

TILE = 1024  # rows of rebuilt keys, over all sequences of a batch: 512 KB of float32 at 128 numbers a head


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
    scaling: float,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    b_k: torch.Tensor | None = None,
    b_v: torch.Tensor | None = None,
    inverse_rms: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    folded: bool = False,
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
    (batch, queries, steps, width), heads, tokens = q.shape, len(A_k), z_k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    group = queries // heads
    rows = (q.to(wide) * scaling).reshape(batch, heads, group * steps, width)  # these read the same keys
    parts_k, parts_v = (  # views [B, T, r_h]
        z.split([width if A is None else A.shape[1] for A in factors], dim=2) for z, factors in ((z_k, A_k), (z_v, A_v))
    )
    up_k, up_v = ([None if A is None else A.to(wide).T for A in factors] for factors in (A_k, A_v))
    bias_k, bias_v = (None if b is None else b.to(wide).view(heads, 1, width) for b in (b_k, b_v))
    highest = [rows.new_full((batch, group * steps, 1), -torch.inf) for _ in range(heads)]
    total = [torch.zeros_like(each) for each in highest]
    sums = [rows.new_zeros(batch, group * steps, part.shape[2]) for part in parts_v]
    tile = max(64, TILE // batch)
    for first in range(0, tokens, tile):
        at = slice(first, min(first + tile, tokens))
        turns = None if cos is None or sin is None else (cos[:, at].to(wide), sin[:, at].to(wide))
        for head in range(heads):
            z = _numbers(parts_k[head], scale_k, at, head, wide)
            K = z.clone() if (up := up_k[head]) is None else z @ up  # [B, tile, D]
            if bias_k is not None:
                K += bias_k[head]
            if inverse_rms is not None:
                K *= inverse_rms[:, at, head, None].to(wide)
            if norm is not None:
                K *= norm.to(wide)
            if turns is not None:
                rotate(K, *turns)
            scores = rows[:, head] @ K.transpose(1, 2)  # [B, group · S, tile]
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            if mask is not None:
                _mask(scores.view(batch, group, steps, -1), mask[:, None, :, at])
            top = torch.maximum(highest[head], scores.amax(2, keepdim=True))
            base = top.masked_fill(top == -torch.inf, 0.0)  # nothing seen so far
            weights = scores.sub_(base).exp_()
            kept = (highest[head] - base).exp_()
            total[head] = total[head] * kept + weights.sum(2, keepdim=True)
            sums[head] = sums[head] * kept + weights @ _numbers(parts_v[head], scale_v, at, head, wide)
            highest[head] = top
    means = [one / whole.masked_fill(whole == 0, 1.0) for one, whole in zip(sums, total, strict=True)]
    if folded:
        parts = [mean.view(batch, group, steps, -1).transpose(1, 2).flatten(2) for mean in means]
        return torch.cat(parts, dim=2).to(q.dtype)
    found = torch.stack([m if up is None else m @ up for m, up in zip(means, up_v, strict=True)], dim=1)
    if bias_v is not None:
        found += bias_v
    return found.view(batch, queries, steps, width).to(q.dtype)


def rotate(K: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate the first Drot numbers of keys [..., T, D] in place, half against half; cos, sin [..., T, Drot]."""
    low, high = K[..., : cos.shape[-1]].chunk(2, dim=-1)
    (cos_low, cos_high), (sin_low, sin_high) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    turned = (high * cos_high).addcmul_(low, sin_high)
    low.mul_(cos_low).addcmul_(high, sin_low, value=-1)
    high.copy_(turned)


def _numbers(z: torch.Tensor, scale: torch.Tensor | None, at: slice, head: int, dtype: torch.dtype) -> torch.Tensor:
    """Latents of one head and tile [B, tile, r] as numbers."""
    numbers = z[:, at].to(dtype)
    return numbers if scale is None else numbers * scale[:, at, head, None].to(dtype)


def _mask(scores: torch.Tensor, mask: torch.Tensor) -> None:
    """Hide tokens in place; scores [B, group, S, tile], mask [B or 1, 1, S, tile]."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores.add_(mask)
