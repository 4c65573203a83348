"""One product for the factors A of all heads, in place of one for each head."""

from collections.abc import Sequence

import torch

ROWS = 32  # of inputs, up to which one padded product takes less time (`benchmarks/heads.py`)


def heads_together(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Weights [out, rank] of all heads, of any ranks, as [heads, out, largest rank]; zero beyond a head's rank."""
    out, widest = len(weights[0]), max(weight.shape[1] for weight in weights)
    together = weights[0].new_zeros(len(weights), out, widest)
    for slot, weight in zip(together, weights, strict=True):
        slot[:, : weight.shape[1]] = weight
    return together


def columns(ranks: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Where the latent of every head starts in rows of heads · largest rank: int64 [sum of ranks]; None if all fill."""
    widest = max(ranks)
    if min(ranks) == widest:
        return None
    return torch.cat([torch.arange(rank, device=device) + head * widest for head, rank in enumerate(ranks)])


def by_head(latent: torch.Tensor, together: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Outputs [..., heads · out] of latents [..., sum of ranks], in the dtype of both."""
    heads, out, widest = together.shape
    rows = latent.reshape(-1, latent.shape[-1])
    if places is not None:
        rows = rows.new_zeros(len(rows), heads * widest).index_copy_(1, places, rows)
    outputs = rows.view(-1, heads, widest).transpose(0, 1) @ together.transpose(1, 2)  # [heads, rows, out]
    return outputs.transpose(0, 1).reshape(*latent.shape[:-1], heads * out)
