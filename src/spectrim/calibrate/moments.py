"""Moments, and the running sums that they grow from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from spectrim.calibrate.forms import CurvatureForm
from spectrim.linear import Linear
from spectrim.maths.roots import wide
from spectrim.maths.sums import Gram


@dataclass(frozen=True)
class Moment:
    """Sums over the token positions that a linear read; divide by ``count`` for means."""

    gram: Gram  # Σ x xᵀ
    abs_sum: torch.Tensor  # Σ |x|  [in] float64
    count: int  # positions

    @property
    def second(self) -> torch.Tensor:
        """``Σ x xᵀ`` [in, in] float64, symmetric; formed at every call, for the caller to write into."""
        return self.gram.dense()


@dataclass(frozen=True)
class GradMoment:
    """Sums over samples of squared gradients of the loss by one weight.

    ``fisher_cols`` is the diagonal empirical Fisher of the weight, summed over its rows: with a sample's loss L (mean
    next-token cross-entropy), Σ_samples Σ_out (∂L/∂W)². It is the importance of FWSVD, Hsu et al., "Language model
    compression with weighted low-rank factorization", ICLR 2022, section 3, for the transposed weight.
    """

    fisher_cols: torch.Tensor  # [in] float64
    count: int  # samples


@dataclass(frozen=True)
class OutputMoment:
    """Sums over the token positions of a linear's output gradients ``g = ∂(Σ losses)/∂y``, in one form.

    A loss is that of one labelled token, in nats. ``traces`` [4, heads] float64 are, for each head of q, k and v and
    for the whole of other linears: Σ ‖g‖²‖x‖² over positions; Σ ‖Σ g xᵀ‖² over samples, the inner sum over the
    positions of one; Σ ‖g‖²; Σ ‖x‖². The first two, divided by the labels, are tr F by token and by sequence.
    """

    form: CurvatureForm
    held: Mapping[str, torch.Tensor | Gram]  # by CurvatureForm.shapes; a full G is a Gram
    traces: torch.Tensor
    count: int  # positions
    labels: int  # labelled tokens

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """The sums, float64, by CurvatureForm.shapes; formed as `Moment.second` is."""
        return formed(self.held)

    def eta(self, *, whole: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """``tr F / (tr G tr C)`` by token and by sequence, float64, [heads] or of the `whole` (docs/methods.md, 3).

        It is 1 where g and x are independent; 0 for a head without gradients.
        """
        token, sequence, gradients, inputs = self.traces
        if whole:
            token, sequence, gradients, inputs = token.sum(), sequence.sum(), gradients.sum(), inputs[0]
        scale = (gradients * inputs).clamp_min(1e-300)
        return token * self.count / scale, sequence * self.count / scale


def held(form: CurvatureForm, sums: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor | Gram]:
    """Sums as an :class:`OutputMoment` of that form holds them."""
    return {name: Gram.of(x) for name, x in sums.items()} if form.kind == "full" else sums


def formed(held: Mapping[str, torch.Tensor | Gram]) -> dict[str, torch.Tensor]:
    """All as tensors."""
    return {name: x.dense() if isinstance(x, Gram) else x for name, x in held.items()}


@dataclass
class MomentSum:
    """The growing sums of one moment: a float32 product per batch, formed where the inputs are, into float64 sums."""

    gram: Gram
    abs_sum: torch.Tensor
    count: int = 0

    @classmethod
    def zero(cls, width: int, home: torch.device) -> "MomentSum":
        """Zero sums on the device ``home``."""
        return cls(Gram(width), torch.zeros(width, dtype=torch.float64, device=home))

    @property
    def second(self) -> torch.Tensor:
        """``Σ x xᵀ`` [in, in] float64."""
        return self.gram.dense()

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """Add inputs ``[positions, in]``; returns a bool scalar on their device: is everything finite?"""
        x = wide(x)
        total = x.abs().sum(0)  # [in]
        self.gram.add(x, self.abs_sum.device)
        self.abs_sum += total.to(self.abs_sum.device)
        self.count += x.shape[0]
        # |Σ x_i x_j|² ≤ Σ x_i² Σ x_j²: a finite diagonal bounds all of the product.
        return x.square().sum(0).isfinite().all()


@cache
def sketch_test(out: int, size: int) -> torch.Tensor:
    """The random matrix [out, size] float32 that a sketch multiplies G by; the same in every run."""
    return torch.randn(out, size, generator=torch.Generator().manual_seed(0))


@dataclass
class OutputSum:
    """The growing sums of one :class:`OutputMoment`."""

    form: CurvatureForm
    held: dict[str, torch.Tensor | Gram]
    traces: torch.Tensor  # [4, heads]
    count: int = 0

    @classmethod
    def zero(cls, form: CurvatureForm, out: int, heads: int, home: torch.device) -> "OutputSum":
        """Zero sums on the device ``home``."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=home)

        full = form.kind == "full"
        held = {name: Gram(out) if full else zeros(*shape) for name, shape in form.shapes(out).items()}
        return cls(form, held, zeros(4, heads))

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """As those of an :class:`OutputMoment`."""
        return formed(self.held)

    def add(self, g: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Add the gradients ``g`` [positions, out] and inputs ``x`` [positions, in] of one sample.

        Or of several, one after the other, of so many positions each (`sizes`). Returns a bool scalar on their device:
        is everything finite?
        """
        g, x = wide(g), wide(x)
        heads = self.traces.shape[1]
        for name, held in self.held.items():
            if isinstance(held, Gram):
                held.add(g, self.traces.device)
            else:
                held += self._product(name, g).to(held.device)
        by_head = g.view(len(g), heads, -1)
        energy, size = by_head.square().sum(2), x.square().sum(1)  # [positions, heads], [positions]
        parts = [len(g)] if sizes is None else [*sizes]
        sequence = torch.stack([_sequence(*one) for one in zip(by_head.split(parts), x.split(parts), strict=True)])
        traces = torch.stack([size @ energy, sequence.sum(0), energy.sum(0), size.sum().expand(heads)])
        self.traces += traces.double().to(self.traces.device)
        self.count += len(g)
        return traces.isfinite().all()

    def _product(self, name: str, g: torch.Tensor) -> torch.Tensor:
        """What gradients g [positions, out] add to a sum that is smaller than G."""
        if self.form.kind == "blocks":
            blocks = g.view(len(g), -1, self.form.size).transpose(0, 1)  # [blocks, positions, size]
            return blocks.transpose(1, 2) @ blocks
        if name == "output_diagonal":
            return g.square().sum(0)
        return g.T @ (g @ sketch_test(g.shape[1], self.form.size).to(g))


def _sequence(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``‖Σ_p g_p x_pᵀ‖²`` by head, [heads], of g [positions, heads, d] and x [positions, in]; by the cheaper route.

    It equals Σ_pq (g_p·g_q)(x_p·x_q), which needs no gradient of the weight.
    """
    positions, heads, size = g.shape
    if positions * (heads * size + x.shape[1]) < heads * size * x.shape[1]:
        parts = g.transpose(0, 1)  # [heads, positions, d]
        return ((parts @ parts.transpose(1, 2)) * (x @ x.T)).sum((1, 2))
    return (g.reshape(positions, -1).T @ x).view(heads, -1).square().sum(1)


@dataclass
class Sums:
    """What one unit of a calibration has gathered so far; the state that a snapshot holds."""

    home: torch.device  # where the sums are kept
    batches: int = 0
    samples: int = 0
    owners: dict[str, str] = field(default_factory=dict)  # linear → the linear whose moment is its moment as well
    moments: dict[str, MomentSum] = field(default_factory=dict)  # by owner
    fisher: dict[str, torch.Tensor] = field(default_factory=dict)  # by linear: [in] float64
    outputs: dict[str, OutputSum] = field(default_factory=dict)  # by linear
    labels: int = 0  # labelled tokens of gradient passes

    def moment(self, owner: str, width: int) -> MomentSum:
        """The sum of one owner; zero at first."""
        if owner not in self.moments:
            self.moments[owner] = MomentSum.zero(width, self.home)
        return self.moments[owner]

    def fisher_columns(self, linear: str, width: int) -> torch.Tensor:
        """The gradient statistic of one linear [in]; zero at first."""
        if linear not in self.fisher:
            self.fisher[linear] = torch.zeros(width, dtype=torch.float64, device=self.home)
        return self.fisher[linear]

    def add_fisher(self, linear: str, gradient: torch.Tensor) -> torch.Tensor:
        """Add one sample's weight gradient ``[out, in]``; returns a bool scalar: is it finite?"""
        columns = gradient.square().sum(0)  # [in]
        self.fisher_columns(linear, len(columns)).add_(columns.to(self.home))
        return columns.isfinite().all()

    def output(self, linear: Linear, form: CurvatureForm) -> OutputSum:
        """The output sums of one linear; zero at first."""
        if linear.name not in self.outputs:
            heads = linear.per_head or 1
            self.outputs[linear.name] = OutputSum.zero(form, linear.out_features, heads, self.home)
        return self.outputs[linear.name]
