"""Attention of one new token over whole keys and values, split over the sequence, as latent_decode_triton cuts it.

What the latent kernels are measured against: the same tiles, without anything to rebuild.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def split_kernel(
    q,
    keys,
    values,
    parts,
    peaks,
    totals,
    tokens,
    scaling,
    split_size,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
):
    """Sums of one split of the tokens, for all queries of a key/value head."""
    split, head, row, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(0)
    g, d, t = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, TILE)
    query = (row * HEADS + head) * GROUP + g
    queries = tl.load(q + query[None, :] * D + d[:, None], (g < GROUP)[None, :], 0.0)  # [D, queries]
    first = split * split_size
    peak = tl.full((16,), -float("inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    sums = tl.zeros((D, 16), tl.float32)
    for start in range(first, tl.minimum(first + split_size, tokens), TILE):
        seen = start + t < tokens
        at = ((row * HEADS + head) * tokens + start) * D + t[:, None] * D + d[None, :]
        scores = tl.dot(tl.load(keys + at, seen[:, None], 0.0), queries) * scaling
        scores = tl.where(seen[:, None], scores * 1.4426950408889634, -float("inf"))
        top = tl.maximum(peak, tl.max(scores, 0))
        kept, weights = tl.exp2(peak - top), tl.exp2(scores - top[None, :])
        total = total * kept + tl.sum(weights, 0)
        value = tl.load(values + at, seen[:, None], 0.0)
        sums = tl.dot(tl.trans(value), weights.to(value.dtype), sums * kept[None, :])
        peak = top
    to = query * splits + split
    tl.store(peaks + to, peak, g < GROUP)
    tl.store(totals + to, total, g < GROUP)
    tl.store(parts + to[None, :] * D + d[:, None], sums, (g < GROUP)[None, :])


@triton.jit
def merge_kernel(parts, peaks, totals, o, splits, D: tl.constexpr, SPLITS_BLOCK: tl.constexpr):
    """The output [D] of one query."""
    query = tl.program_id(0).to(tl.int64)
    n, d = tl.arange(0, SPLITS_BLOCK), tl.arange(0, D)
    every = tl.load(peaks + query * splits + n, n < splits, -float("inf"))
    top = tl.max(every, 0)
    total = tl.sum(tl.exp2(every - top) * tl.load(totals + query * splits + n, n < splits, 0.0), 0)
    sums = tl.zeros((D,), tl.float32)
    for start in range(0, splits, 16):
        m = start + tl.arange(0, 16)
        weights = tl.exp2(tl.load(peaks + query * splits + m, m < splits, -float("inf")) - top)
        part = tl.load(parts + (query * splits + m)[:, None] * D + d[None, :], (m < splits)[:, None], 0.0)
        sums += tl.sum(part * weights[:, None], 0)
    tl.store(o + query * D + d, (sums / total).to(o.dtype.element_ty))


def full_decode(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, processors: int
) -> torch.Tensor:
    """[B, Hq, D] of queries [B, Hq, D] and rotated keys and values [B, H, T, D], contiguous; D a power of two."""
    (batch, queries, width), (heads, tokens) = q.shape, keys.shape[1:3]
    tile = 64
    tiles = min(max(batch * heads * tokens // (4 * processors * tile), 1), 32)
    split = max(tiles, triton.cdiv(tokens, 1024 * tile)) * tile
    splits = triton.cdiv(tokens, split)
    parts = torch.empty(batch, queries, splits, width, dtype=torch.float32, device=q.device)
    peaks, totals = torch.empty(2, batch, queries, splits, dtype=torch.float32, device=q.device)
    o = torch.empty_like(q)
    split_kernel[(splits, heads, batch)](
        q, keys, values, parts, peaks, totals, tokens, scaling, split, TILE=tile, HEADS=heads, GROUP=queries // heads,
        D=width, num_warps=4,
    )  # fmt: skip
    block = max(64, triton.next_power_of_2(splits))
    merge_kernel[(batch * queries,)](parts, peaks, totals, o, splits, D=width, SPLITS_BLOCK=block, num_warps=4)
    return o
