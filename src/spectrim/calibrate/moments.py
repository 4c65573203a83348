"""Moments, and the running sums that they grow from."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Moment:
    """Sums over the token positions that a linear read; divide by ``count`` for means."""

    second: torch.Tensor  # Σ x xᵀ  [in, in] float64, symmetric
    abs_sum: torch.Tensor  # Σ |x|  [in] float64
    count: int  # positions


@dataclass(frozen=True)
class GradMoment:
    """Sums over samples of what the gradient of a sample's loss says about one weight.

    ``fisher_cols`` is the diagonal empirical Fisher of the weight, summed over its rows: with a sample's loss L (mean
    next-token cross-entropy), Σ_samples Σ_out (∂L/∂W)². It is the importance of FWSVD, Hsu et al., "Language model
    compression with weighted low-rank factorization", ICLR 2022, section 3, for the transposed weight.
    """

    fisher_cols: torch.Tensor  # [in] float64
    count: int  # samples


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in at least float32, the precision in which products are formed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class MomentSum:
    """The growing sums of one moment: a float32 product per batch, formed where the inputs are, into float64 sums."""

    second: torch.Tensor
    abs_sum: torch.Tensor
    count: int = 0

    @classmethod
    def zero(cls, width: int, home: torch.device) -> "MomentSum":
        """Sums of nothing, on the device ``home``."""
        second = torch.zeros(width, width, dtype=torch.float64, device=home)
        return cls(second, torch.zeros(width, dtype=torch.float64, device=home))

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """Add inputs ``[positions, in]``; returns a bool scalar on their device: is everything finite?"""
        x = wide(x)
        product = x.T @ x  # [in, in]
        total = x.abs().sum(0)  # [in]
        self.second += product.to(self.second.device)
        self.abs_sum += total.to(self.abs_sum.device)
        self.count += x.shape[0]
        # |Σ x_i x_j|² ≤ Σ x_i² Σ x_j²: a finite diagonal bounds all of the product.
        return product.diagonal().isfinite().all()


@dataclass
class Sums:
    """What has been gathered from one modality so far; the state that a snapshot holds."""

    home: torch.device  # where the sums are kept
    batches: int = 0
    samples: int = 0
    owners: dict[str, str] = field(default_factory=dict)  # linear → the linear whose moment is its moment as well
    moments: dict[str, MomentSum] = field(default_factory=dict)  # by owner
    fisher: dict[str, torch.Tensor] = field(default_factory=dict)  # by linear: [in] float64

    def moment(self, owner: str, width: int) -> MomentSum:
        """The sum of one owner; begun at zero."""
        if owner not in self.moments:
            self.moments[owner] = MomentSum.zero(width, self.home)
        return self.moments[owner]

    def add_fisher(self, linear: str, gradient: torch.Tensor) -> torch.Tensor:
        """Add one sample's weight gradient ``[out, in]``; returns a bool scalar: is it finite?"""
        columns = gradient.square().sum(0)  # [in]
        if linear not in self.fisher:
            self.fisher[linear] = torch.zeros(len(columns), dtype=torch.float64, device=self.home)
        self.fisher[linear] += columns.to(self.home)
        return columns.isfinite().all()
