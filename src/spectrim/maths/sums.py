"""Sums of products that grow in float64, without a second matrix of their size."""

import torch

SLAB = 2048  # rows of a product that are formed at once


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += leftᵀ right`` for left [n, rows] and right [n, columns], formed where and as precisely as they are.

    `total` [rows, columns] may be on another device and is usually float64.
    """
    for start in range(0, left.shape[1], SLAB):
        product = left[:, start : start + SLAB].T @ right  # [≤ SLAB, columns]
        total[start : start + SLAB] += product.to(total.device)
