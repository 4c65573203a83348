"""Attention over a key/value cache that keeps latents, for one new token, as Triton kernels; needs triton.

The reference is `latent_decode.latent_decode`. A program has some tokens of one sequence, and all queries of a
key/value head: it rebuilds keys tile by tile from their latents, in registers, rotates them at their positions, and
sums the latents of values under an online softmax. A second kernel adds up the parts of each query by their logarithms
of sums, and multiplies the sum by A_v once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

QUERIES = 8  # at least, of one head, that a product has on the tensor cores


@triton.jit
def split_kernel(
    q,
    z_k,
    z_v,
    a_k,
    columns_k,
    columns_v,
    cos,
    sin,
    b_k,
    inverse_rms,
    scale_k,
    scale_v,
    mask,
    starts,
    lengths,
    parts,
    peaks,
    totals,
    tokens,
    window,
    scaling,
    softcap,
    row_k,
    token_k,
    row_v,
    token_v,
    row_cos,
    token_cos,
    row_rms,
    token_rms,
    row_scale,
    token_scale,
    row_mask,
    token_mask,
    split_size,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    PROGRAM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK_K: tl.constexpr,
    RANK_V: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of one split of the tokens, for `PROGRAM_HEADS` key/value heads one after the other; see `decode`.

    A key has three stretches of numbers: two halves that are rotated against each other, ``[0, HALF)`` and
    ``[HALF, 2 HALF)``, and a rest that is not. Scores and sums are transposed, [tokens, queries] and [rank, queries]:
    rebuilt keys then go from one product into the next without leaving the registers.
    """
    split, row, splits = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.num_programs(0)
    end, low = tokens, 0
    if lengths is not None:
        end = tl.load(lengths + row).to(tl.int32)
    if starts is not None:
        low = tl.load(starts + row).to(tl.int32)
    if window is not None:
        low = tl.maximum(low, end - window)
    first = low + split * split_size
    last = tl.minimum(first + split_size, end)
    g, d, t = tl.arange(0, GROUP_BLOCK), tl.arange(0, CHUNK), tl.arange(0, TILE)
    r, s = tl.arange(0, RANK_K), tl.arange(0, RANK_V)
    kind = q.dtype.element_ty
    for i in range(PROGRAM_HEADS):
        head = tl.program_id(1) * PROGRAM_HEADS + i
        query = (row * HEADS + head) * GROUP + g
        column_k, column_v = tl.load(columns_k + head), tl.load(columns_v + head)
        rank_k = tl.load(columns_k + head + 1) - column_k
        rank_v = tl.load(columns_v + head + 1) - column_v
        column_k, rank_k = tl.multiple_of(column_k, ALIGNED), tl.multiple_of(rank_k, ALIGNED)
        column_v, rank_v = tl.multiple_of(column_v, ALIGNED), tl.multiple_of(rank_v, ALIGNED)
        from_q, some = q + query[None, :] * D, (g < GROUP)[None, :]
        from_a, has = a_k + (column_k + r[:, None]) * D, (r < rank_k)[:, None]
        peak = tl.full((GROUP_BLOCK,), -float("inf"), tl.float32)
        total = tl.zeros((GROUP_BLOCK,), tl.float32)
        sums = tl.zeros((RANK_V, GROUP_BLOCK), tl.float32)
        for start in range(first, last, TILE):
            seen, begin = start + t < last, first.to(tl.int64) + (start - first)
            if mask is not None:
                from_m = mask + (row * row_mask + begin * token_mask)
                seen = seen & (tl.load(from_m + t * token_mask, seen, 0) != 0)
            from_k = z_k + (row * row_k + begin * token_k + column_k)
            from_v = z_v + (row * row_v + begin * token_v + column_v)
            z = tl.load(from_k + (t[:, None] * token_k + r[None, :]), seen[:, None] & (r < rank_k)[None, :], 0)
            value = tl.load(from_v + (t[:, None] * token_v + s[None, :]), seen[:, None] & (s < rank_v)[None, :], 0)
            z, value = z.to(kind), value.to(kind)
            if scale_k is not None:
                from_s = scale_k + (row * row_scale + begin * token_scale + head)
                scale = tl.load(from_s + t * token_scale, seen, 0.0).to(tl.float32)[:, None]
            if inverse_rms is not None:
                from_r = inverse_rms + (row * row_rms + begin * token_rms + head)
                rms = tl.load(from_r + t * token_rms, seen, 0.0).to(tl.float32)[:, None]
            scores = tl.zeros((TILE, GROUP_BLOCK), tl.float32)
            for c in range(0, HALF, CHUNK):
                inside = c + d < HALF
                there, across = has & inside[None, :], some & inside[:, None]
                low_key = tl.dot(z, tl.load(from_a + (c + d)[None, :], there, 0.0), input_precision=PRECISION)
                high_key = tl.dot(z, tl.load(from_a + (HALF + c + d)[None, :], there, 0.0), input_precision=PRECISION)
                if scale_k is not None:
                    low_key, high_key = low_key * scale, high_key * scale
                if b_k is not None:
                    from_b = b_k + head * D + c
                    low_key += tl.load(from_b + d, inside, 0.0).to(tl.float32)[None, :]
                    high_key += tl.load(from_b + HALF + d, inside, 0.0).to(tl.float32)[None, :]
                if inverse_rms is not None:
                    low_key, high_key = low_key * rms, high_key * rms
                if cos is not None:
                    place, there = t[:, None] * token_cos + (c + d)[None, :], seen[:, None] & inside[None, :]
                    turn = tl.load(cos + (row * row_cos + begin * token_cos) + place, there, 0.0).to(tl.float32)
                    lift = tl.load(sin + (row * row_cos + begin * token_cos) + place, there, 0.0).to(tl.float32)
                    low_key, high_key = low_key * turn - high_key * lift, high_key * turn + low_key * lift
                queries = tl.load(from_q + (c + d)[:, None], across, 0.0)  # [chunk, queries]
                scores = tl.dot(low_key.to(kind), queries, scores, input_precision=PRECISION)
                queries = tl.load(from_q + (HALF + c + d)[:, None], across, 0.0)
                scores = tl.dot(high_key.to(kind), queries, scores, input_precision=PRECISION)
            for c in range(2 * HALF, D, CHUNK):
                inside = c + d < D
                factor = tl.load(from_a + (c + d)[None, :], has & inside[None, :], 0.0)
                key = tl.dot(z, factor, input_precision=PRECISION)
                if scale_k is not None:
                    key *= scale
                if b_k is not None:
                    key += tl.load(b_k + head * D + c + d, inside, 0.0).to(tl.float32)[None, :]
                if inverse_rms is not None:
                    key *= rms
                queries = tl.load(from_q + (c + d)[:, None], some & inside[:, None], 0.0)
                scores = tl.dot(key.to(kind), queries, scores, input_precision=PRECISION)
            scores *= scaling
            if softcap is not None:
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
            scores = tl.where(seen[:, None], scores * 1.4426950408889634, -float("inf"))  # for powers of two
            top = tl.maximum(peak, tl.max(scores, 0))
            base = tl.where(top == -float("inf"), 0.0, top)  # nothing seen so far
            kept, weights = tl.exp2(peak - base), tl.exp2(scores - base[None, :])
            total = total * kept + tl.sum(weights, 0)
            if scale_v is not None:
                from_s = scale_v + (row * row_scale + begin * token_scale + head)
                weights *= tl.load(from_s + t * token_scale, seen, 0.0).to(tl.float32)[:, None]
            sums = tl.dot(tl.trans(value), weights.to(kind), sums * kept[None, :], input_precision=PRECISION)
            peak = top
        to = query * splits + split
        tl.store(peaks + to, peak, g < GROUP)
        tl.store(totals + to, total, g < GROUP)
        tl.store(parts + to[None, :] * RANK_V + s[:, None], sums, some)


@triton.jit
def merge_kernel(
    parts,
    peaks,
    totals,
    a_v,
    b_v,
    columns_v,
    o,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    RANK_V: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
):
    """The output [D] of one query, from the sums of its splits, or their mean [rank] without a_v; see `decode`."""
    CHUNK: tl.constexpr = 2048 // RANK_V  # splits at once
    OUT: tl.constexpr = 4096 // RANK_V  # and numbers of the output
    query = tl.program_id(1).to(tl.int64) * HEADS * GROUP + tl.program_id(0)
    head = tl.program_id(0) // GROUP
    n, s = tl.arange(0, SPLITS_BLOCK), tl.arange(0, RANK_V)
    every = tl.load(peaks + query * splits + n, n < splits, -float("inf"))
    top = tl.max(every, 0)
    top = tl.where(top == -float("inf"), 0.0, top)  # a query that sees nothing has sums of zero
    total = tl.sum(tl.exp2(every - top) * tl.load(totals + query * splits + n, n < splits, 0.0), 0)
    sums = tl.zeros((RANK_V,), tl.float32)
    for start in range(0, splits, CHUNK):
        m = start + tl.arange(0, CHUNK)
        weights = tl.exp2(tl.load(peaks + query * splits + m, m < splits, -float("inf")) - top)
        part = tl.load(parts + (query * splits + m)[:, None] * RANK_V + s[None, :], (m < splits)[:, None], 0.0)
        sums += tl.sum(part * weights[:, None], 0)
    sums /= tl.where(total == 0, 1.0, total)
    column = tl.load(columns_v + head)
    rank = tl.load(columns_v + head + 1) - column
    if a_v is None:
        place = GROUP * (tl.program_id(1).to(tl.int64) * tl.load(columns_v + HEADS) + column)  # of the first query
        tl.store(o + place + tl.program_id(0) % GROUP * rank + s, sums.to(o.dtype.element_ty), s < rank)
    else:
        for first in range(0, D, OUT):
            d = first + tl.arange(0, OUT)
            a = tl.load(a_v + (column + s[:, None]) * D + d[None, :], (s < rank)[:, None] & (d < D)[None, :], 0.0)
            y = tl.sum(a.to(tl.float32) * sums[:, None], 0)
            if b_v is not None:
                y += tl.load(b_v + head * D + d, d < D, 0.0).to(tl.float32)
            tl.store(o + query * D + d, y.to(o.dtype.element_ty), d < D)


@dataclass(frozen=True)
class Factors:
    """What the kernels read of one layer, made once by `of`.

    ``a_k`` and ``a_v`` [Σ r_h, D] have the heads' transposed factors one after another, and ``columns_k`` and
    ``columns_v`` int32 [H + 1] say where each begins; ``b_k`` and ``b_v`` [H · D] or None. ``ranks`` are the largest of
    keys and of values, and ``aligned`` is 16 if all are multiples of it.
    """

    a_k: torch.Tensor
    a_v: torch.Tensor
    b_k: torch.Tensor | None
    b_v: torch.Tensor | None
    columns_k: torch.Tensor
    columns_v: torch.Tensor
    ranks: tuple[int, int]
    aligned: int

    @classmethod
    def of(
        cls,
        A_k: Sequence[torch.Tensor | None],
        A_v: Sequence[torch.Tensor | None],
        b_k: torch.Tensor | None = None,
        b_v: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
    ) -> "Factors":
        """Of each head's factors [D, r_h], biases [H · D], and the weight [D] of a norm of keys.

        Factors that are None are the identity; one has to be there. A norm is multiplied into factors and bias, and
        rounded there. Ranks that are all multiples of 16 are read fastest.
        """
        like = next(A for A in (*A_k, *A_v) if A is not None)
        one = torch.eye(len(like), dtype=like.dtype, device=like.device)
        keys, values = ([one if A is None else A for A in factors] for factors in (A_k, A_v))
        if norm is not None:
            keys = [(A.float() * norm.float()[:, None]).to(A.dtype) for A in keys]
            if b_k is not None:
                b_k = (b_k.float() * norm.float().repeat(len(keys))).to(b_k.dtype)
        ranks_k, ranks_v = ([A.shape[1] for A in factors] for factors in (keys, values))
        a_k, a_v = (torch.cat([A.T for A in factors]).contiguous() for factors in (keys, values))
        columns_k, columns_v = (
            torch.tensor([0, *ranks]).cumsum(0).to(a_k.device, torch.int32) for ranks in (ranks_k, ranks_v)
        )
        aligned = 16 if all(rank % 16 == 0 for rank in (*ranks_k, *ranks_v)) else 1
        return cls(a_k, a_v, b_k, b_v, columns_k, columns_v, (max(ranks_k), max(ranks_v)), aligned)

    @property
    def blocks(self) -> tuple[int, int]:
        """The ranks as powers of two from 16 on: numbers of a token in registers. Only a head's own are ever read."""
        rank_k, rank_v = (max(16, triton.next_power_of_2(rank)) for rank in self.ranks)
        return rank_k, rank_v


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Tokens of one program, and of one tile of it; numbers of a key that are rebuilt at once, of each half; key/value
    heads of one program, one after the other; its warps; and tiles on their way at once.
    """

    split: int
    tile: int
    chunk: int
    heads: int
    warps: int
    stages: int = 2

    @classmethod
    def fitting(cls, batch: int, tokens: int, heads: int, rank: int, half: int, bias: bool, processors: int) -> "Tiles":
        """For a shape, with ranks up to `rank`, `half` the rotated numbers, biases or not, and so many multiprocessors.

        There are about four programs for each of them, but no program has less than one tile or more than 64. Tiles
        have 32 tokens: with 64, products become asynchronous ones of Hopper (wgmma), and the code that Triton 3.6 made
        of these read outside its memory on an H200. Halves of 64 numbers are rebuilt at once, since Triton then keeps
        their factors in shared memory; with biases, or factors of higher ranks, they would not fit into the registers
        (`tools/kernel_resources.py`).
        """
        tile, warps = 32, 4 if rank <= 64 else 8
        chunk, stages = (64, 3) if 32 < half <= 64 and rank <= 64 and not bias else (16, 2)
        tiles = min(max(batch * tokens * heads // (4 * processors * tile), 1), 64)
        return cls(max(tiles, triton.cdiv(tokens, 1024 * tile)) * tile, tile, chunk, 1, warps, stages)


def latent_decode(
    q: torch.Tensor,
    z_k: torch.Tensor,
    z_v: torch.Tensor,
    A_k: Sequence[torch.Tensor | None],
    A_v: Sequence[torch.Tensor | None],
    *,
    b_k: torch.Tensor | None = None,
    b_v: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """As `latent_decode.latent_decode`, with the same arguments; `decode` is for factors that were made ready once."""
    return decode(q, z_k, z_v, Factors.of(A_k, A_v, b_k, b_v, norm), **options)


def decode(
    q: torch.Tensor,
    z_k: torch.Tensor,
    z_v: torch.Tensor,
    factors: Factors,
    *,
    scaling: float,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    inverse_rms: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    folded: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """One decode step of one layer over latents.

    Args:
        q: rotated queries [B, Hq, D], float16 or bfloat16, in which products are made; sums are in float32. (float32
            is for tests: on a GPU its products do not fit into registers.)
        z_k, z_v: latents [B, T, Σ r_h] of the dtype of q, or int8.
        factors: of the layer, in the dtype of q.
        cos, sin: [B or 1, T, Drot]; both halves of the last dimension are alike, and only the first is read.
        mask: which tokens are seen, bool [B or 1, T], besides what the following say.
        scaling, inverse_rms, scale_k, scale_v, start, length, window, softcap, folded: see the reference.
        tiles: how the work is cut; None for what fits the device.

    Returns:
        [B, Hq, D] in the dtype of q; folded, [B, Hq / H · Σ r_h].

    Raises:
        ValueError: the queries are no multiple of the key/value heads, or tensors do not lie in memory as is needed:
            numbers of one token side by side, and pairs (cos and sin, both scales) alike.
    """
    (batch, queries, width), tokens, heads = q.shape, z_k.shape[1], len(factors.columns_k) - 1
    if queries % heads:
        raise ValueError(f"{queries} query heads cannot share {heads} key/value heads")
    for one, other in ((cos, sin), (scale_k, scale_v)):
        if one is not None and other is not None and one.stride() != other.stride():
            raise ValueError("cos and sin have to lie alike in memory, and so have both scales")
    group, half = queries // heads, (width if cos is None else cos.shape[2]) // 2
    rank_k, rank_v = factors.blocks
    if tiles is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
        tiles = Tiles.fitting(batch, tokens, heads, max(rank_k, rank_v), half, factors.b_k is not None, processors)
    splits = triton.cdiv(tokens if window is None else min(window, tokens), tiles.split)
    parts = torch.empty(batch, queries, splits, rank_v, dtype=torch.float32, device=q.device)
    peaks, totals = torch.empty(2, batch, queries, splits, dtype=torch.float32, device=q.device)
    o = q.new_empty(batch, *((group * z_v.shape[2],) if folded else (queries, width)))
    scale = scale_v if scale_k is None else scale_k
    strides = [stride for x in (z_k, z_v, cos, inverse_rms, scale, mask) for stride in _strides(x)]
    with torch.cuda.device_of(q):  # Triton starts its programs on the current device
        split_kernel[(splits, heads // tiles.heads, batch)](
            q.contiguous(), z_k, z_v, factors.a_k, factors.columns_k, factors.columns_v, cos, sin, factors.b_k,
            inverse_rms, scale_k, scale_v, mask, start, length, parts, peaks, totals, tokens, window, scaling, softcap,
            *strides, tiles.split, TILE=tiles.tile, CHUNK=tiles.chunk, HEADS=heads, PROGRAM_HEADS=tiles.heads,
            GROUP=group, GROUP_BLOCK=max(QUERIES, triton.next_power_of_2(group)), D=width, HALF=half, RANK_K=rank_k,
            RANK_V=rank_v, ALIGNED=factors.aligned, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        a_v, most = None if folded else factors.a_v, max(64, triton.next_power_of_2(splits))
        merge_kernel[(queries, batch)](
            parts, peaks, totals, a_v, factors.b_v, factors.columns_v, o, splits, HEADS=heads, GROUP=group, D=width,
            RANK_V=rank_v, SPLITS_BLOCK=most, num_warps=4,
        )  # fmt: skip
    return o


def _strides(x: torch.Tensor | None) -> tuple[int, int]:
    """Numbers from one sequence and from one token to the next; 0 for what all sequences share."""
    if x is None:
        return 0, 0
    if x.ndim > 2 and x.stride(2) != 1:
        raise ValueError("the numbers of one token have to lie side by side")
    return x.stride(0) if len(x) > 1 else 0, x.stride(1)
