"""A linear of some of its inputs, or with some of its outputs alone: the units that a narrower MLP is left with."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import skip_init

from spectrim.errors import ModelError
from spectrim.linear import Linear
from spectrim.maths.removal import STEPS, fitted, removal
from spectrim.recipe import QuantizePart
from spectrim.storage.base import Form, Options, Spec, StoredLayer, Tensors, register
from spectrim.storage.problem import Problem

READERS = ("down", "fc2")  # roles of the linears that read the units of an MLP
LEAST = 8  # an eighth of the units is always kept; factors are smaller
_SIDES = ("inputs", "outputs")


class NarrowLinear(StoredLayer):
    """``y = N x[units] + bias``, or ``y[units] = N x`` and zero elsewhere, plus the bias.

    The child ``N`` is a bias-free ``nn.Linear``, ``units`` a buffer, int32 [count], ascending. `side` says of what the
    units are: ``inputs`` or ``outputs``. ``N`` starts as NaN.
    """

    units: torch.Tensor
    form = "narrow"

    def __init__(self, linear: nn.Linear, side: str, count: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.side = side
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        shape = (count, self.out_features) if side == "inputs" else (self.in_features, count)
        self.N = skip_init(nn.Linear, *shape, bias=False, **like)
        with torch.no_grad():
            self.N.weight.fill_(torch.nan)
        self.register_buffer("units", torch.arange(count, dtype=torch.int32, device=linear.weight.device))

    @property
    def spec(self) -> dict[str, Any]:
        """How many units there are, by their side."""
        return {self.side: len(self.units)}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map inputs [..., in] to [..., out]."""
        if self.side == "inputs":
            y: torch.Tensor = self.N(input.index_select(-1, self.units))
        else:
            few = self.N(input)
            y = few.new_zeros(*few.shape[:-1], self.out_features).index_copy(-1, self.units.long(), few)
        return y if self.bias is None else y + self.bias

    def product(self) -> torch.Tensor:
        """The weight, zero where there are no units; ModelError where it is offloaded."""
        self.check_values()
        W: torch.Tensor = self.N.weight
        return W.new_zeros(self.out_features, self.in_features).index_copy(
            1 if self.side == "inputs" else 0, self.units.long(), W
        )

    def change(self, W: torch.Tensor) -> torch.Tensor:
        """Without the outputs that it has no more, since nothing reads them."""
        found = super().change(W)
        if self.side == "inputs":
            return found
        unit = self.units.long()
        return torch.zeros_like(found).index_copy(0, unit, found[unit])

    def loaded(self) -> None:
        """Raises ModelError for units that are not different ones of its side."""
        if self.units.is_meta:
            return
        most = self.in_features if self.side == "inputs" else self.out_features
        units = self.units.long()
        if bool((units.diff() <= 0).any()) or not 0 <= int(units[0]) <= int(units[-1]) < most:
            raise ModelError(f"units: they are not ascending numbers of its {most} {self.side}")


class Narrow(Form):
    """``inputs`` or ``outputs``: how many units are kept, of those that an MLP computes and then reads.

    Of the linear that reads them there are options; those that compute them follow (:mod:`spectrim.plan.units`), and
    lose nothing, since what they leave out is not read.
    """

    name = "narrow"
    marker = "N.weight"

    def options(self, problem: Problem) -> Options:
        """Widths in steps of a 64th of the units, fitted again, of a linear that reads the units of an MLP."""
        linear, storage = problem.linear, problem.storage
        if not storage.narrow or linear.role not in READERS or problem.fixed_bits or problem.quantize.plain:
            return Options.listed(self.name, [])
        counts = widths(linear.in_features, storage.multiple)
        sizes = np.array([self.nbytes(linear, {"inputs": count}) for count in counts], np.int64)
        error = problem.removal.error[[linear.in_features - count for count in counts]].numpy()
        smaller = [n for n, size in enumerate(sizes.tolist()) if size < linear.nbytes]
        return Options(self.name, sizes[smaller], error[smaller], lambda n: {"inputs": counts[smaller[n]]})

    def make(self, problem: Problem, spec: Spec) -> Tensors:
        """The weight on the units that stay, fitted again, or the rows that compute them."""
        layer = self.build(problem.empty(), spec)
        if layer.side == "inputs":
            kept = problem.removal.kept(len(layer.units))
            W = fitted(problem.W, kept, problem.C)
        else:
            kept = (problem.removal if problem.units else removal(problem.W.T, problem.G, problem.C)).kept(
                len(layer.units)
            )
            W = problem.W[kept]
        with torch.no_grad():
            layer.N.weight.copy_(W)
            layer.units.copy_(kept)
        return layer.state_dict()

    def build(self, linear: nn.Linear, spec: Spec) -> NarrowLinear:
        """An empty NarrowLinear."""
        side, count = next(iter(spec.items()), (None, None))
        if len(spec) != 1 or side not in _SIDES:
            raise ModelError(f"{dict(spec)} does not say how many of its inputs, or of its outputs, are kept")
        most = linear.in_features if side == "inputs" else linear.out_features
        if type(count) is not int or not 0 < count <= most:
            raise ModelError(f"it has {most} {side}, and of those {count} cannot be kept")
        layer = NarrowLinear(linear, str(side), count)
        layer.N.requires_grad_(linear.weight.requires_grad)
        return layer.train(linear.training)

    def least(self, linear: Linear, quantize: QuantizePart) -> int:
        """Bytes of the fewest units, where weights may be floats."""
        floats = quantize.bits in (None, "auto") and not quantize.plain
        return linear.nbytes // LEAST if floats else linear.nbytes


def widths(units: int, multiple: int = 1) -> list[int]:
    """How many of so many units may be kept: from an eighth on, every 64th part, in multiples, without all of them."""
    step = -(-max(1, units // STEPS) // multiple) * multiple
    return [count for count in range(step, units, step) if count * LEAST >= units]


def nbytes(linear: Linear, count: int) -> int:
    """Bytes of a linear with so many of its outputs."""
    return count * (linear.in_features * linear.dtype.itemsize + torch.int32.itemsize)


register(Narrow())
