"""A linear of some of its inputs, or with some of its outputs alone: the units that a narrower MLP is left with."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from spectrim.errors import ModelError
from spectrim.linear import Linear
from spectrim.maths.decompose import OutputMetric
from spectrim.maths.removal import STEPS, fitted, removal
from spectrim.maths.roots import BlockRoot
from spectrim.maths.rounding import Grid, fitting_group
from spectrim.recipe import QuantizePart
from spectrim.storage.base import Form, Options, Spec, StoredLayer, Tensors, register
from spectrim.storage.integers import allowed_bits, checked_grid, rounded
from spectrim.storage.packed import PackedLinear
from spectrim.storage.problem import Problem

READERS = ("down", "fc2")  # roles of the linears that read the units of an MLP
LEAST = 8  # an eighth of the units is always kept; factors are smaller
_SIDES = ("inputs", "outputs")
_KERNEL = 32  # inputs and outputs of integers that kernels take are multiples of it
_PRICED = 16  # widths of integers are steps of so many: each has to be rounded to be priced


class NarrowLinear(StoredLayer):
    """``y = N x[units] + bias``, or ``y[units] = N x`` and zero elsewhere, plus the bias.

    The child ``N`` is a bias-free ``nn.Linear``, or a PackedLinear on a `grid`; ``units`` is a buffer, int32 [count],
    ascending. `side` says of what the units are: ``inputs`` or ``outputs``. ``N`` starts as NaN.
    """

    units: torch.Tensor
    form = "narrow"

    def __init__(self, linear: nn.Linear, side: str, count: int, grid: Grid | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.side = side
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        shape = (count, self.out_features) if side == "inputs" else (self.in_features, count)
        self.N: Any
        if grid is None:
            self.N = skip_init(nn.Linear, *shape, bias=False, **like)
            nn.init.constant_(self.N.weight, torch.nan)
        else:
            self.N = PackedLinear(*shape, grid, bias=False, **like)
        self.register_buffer("units", torch.arange(count, dtype=torch.int32, device=linear.weight.device))

    @property
    def spec(self) -> dict[str, Any]:
        """How many units there are, by their side, and the grid of integers."""
        grid = {"grid": self.N.grid.spec} if isinstance(self.N, PackedLinear) else {}
        return {self.side: len(self.units)} | grid

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
        W: torch.Tensor = self.N.dense() if isinstance(self.N, PackedLinear) else self.N.weight
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
        check_units(self.units, self.in_features if self.side == "inputs" else self.out_features, self.side)
        if isinstance(self.N, PackedLinear):
            self.N.loaded()


def check_units(units: torch.Tensor, most: int, side: str) -> None:
    """Raise ModelError for units that are not ascending numbers of the inputs or outputs of a linear."""
    units = units.long()
    if bool((units.diff() <= 0).any()) or not 0 <= int(units[0]) <= int(units[-1]) < most:
        raise ModelError(f"units: they are not ascending numbers of its {most} {side}")


class Narrow(Form):
    """``inputs`` or ``outputs``: how many units are kept, of those that an MLP computes and then reads.

    ``grid`` (as of `Integers`) is that of integers; without it the weight on the units is floats.
    The linear that reads the units chooses them. Those that compute them lose nothing but by rounding, since what they
    leave out is not read; :mod:`spectrim.plan.units` says which options of theirs go together.
    """

    name = "narrow"
    marker = "units"
    searches = True

    def options(self, problem: Problem) -> Options:
        """Widths of a linear that reads or computes the units of an MLP: in floats, and in all bits that are allowed.

        Floats come in steps of a 64th of the units, integers of a 16th, in whole groups, or such as kernels take.
        """
        linear, storage, reads = problem.linear, problem.storage, problem.linear.role in READERS
        rows: list[tuple[int, float, Spec]] = []
        if not storage.narrow or problem.quantize.plain or not (reads or problem.units):
            return Options.listed(self.name, rows)
        units = linear.in_features if reads else linear.out_features
        side, error = _SIDES[not reads], problem.removal.error if reads else torch.zeros(units + 1)
        if not problem.fixed_bits:
            for count in widths(units, storage.multiple):
                rows.append((self.nbytes(linear, {side: count}), float(error[units - count]), {side: count}))
        # A row is rounded as it is whatever others there are; columns are fitted again, and groups hold others.
        by_row: dict[int, torch.Tensor] = {}
        if not reads:
            alone = torch.ones(units, dtype=torch.float64, device=problem.W.device)
            for bits in allowed_bits(problem):
                grid = problem.grid(bits, linear.in_features)
                by_row[bits] = problem.noise(problem.W, grid, outputs=alone).sum(1)
        step = fitting_group(units, problem.quantize.group) or fitting_group(units, _KERNEL) or 1
        for count in widths(units, step * storage.multiple, _PRICED) if allowed_bits(problem) else ():
            kept = problem.removal.kept(count)
            few = remaining(problem, side, kept)
            for bits in allowed_bits(problem):
                grid = problem.grid(bits, few.linear.in_features)
                each = few.noise(few.W, grid) if reads else by_row[bits][kept] * few.output_weights
                spec = {side: count, "grid": grid.spec}
                rows.append((self.nbytes(linear, spec), float(error[units - count]) + float(each.sum()), spec))
        return Options.listed(self.name, rows)

    def make(self, problem: Problem, spec: Spec) -> Tensors:
        """The weight on the units that stay, fitted again, or the rows that compute them; rounded on a grid."""
        layer = self.build(problem.empty(), spec)
        reads = layer.side == "inputs"
        order = problem.removal if reads or problem.units else removal(problem.W.T, problem.G, problem.C)
        kept = order.kept(len(layer.units))
        few = remaining(problem, layer.side, kept)
        if isinstance(layer.N, PackedLinear):
            layer.N.load(rounded(few, few.W, layer.N.grid, few.C, few.G, problem.linear.dtype))
        with torch.no_grad():
            if isinstance(layer.N, nn.Linear):
                layer.N.weight.copy_(few.W)
            layer.units.copy_(kept)
        return layer.state_dict()

    def build(self, linear: nn.Linear, spec: Spec) -> NarrowLinear:
        """An empty NarrowLinear."""
        layer = NarrowLinear(linear, *width(spec, linear.in_features, linear.out_features))
        layer.N.requires_grad_(linear.weight.requires_grad)
        return layer.train(linear.training)

    def params(self, linear: Linear, spec: Spec) -> int:
        """Numbers of the weight on the units."""
        return spec["inputs"] * linear.out_features if "inputs" in spec else spec["outputs"] * linear.in_features

    def least(self, linear: Linear, quantize: QuantizePart) -> int:
        """Bytes of the fewest units in floats; not known before samples run where there may be integers."""
        if quantize.plain:
            return linear.nbytes
        return 0 if quantize.takes(linear.role) else linear.nbytes // LEAST


def width(spec: Spec, size: int, out: int) -> tuple[str, int, Grid | None]:
    """The side, the number of units and the grid of a spec. Raises ModelError where a linear cannot have it."""
    grid = checked_grid(spec["grid"]) if "grid" in spec else None
    side, count = next(((key, value) for key, value in spec.items() if key != "grid"), ("", None))
    if len(spec) != 1 + (grid is not None) or side not in _SIDES:
        raise ModelError(f"{dict(spec)} does not say how many of its inputs, or of its outputs, are kept")
    most = size if side == "inputs" else out
    if type(count) is not int or not 0 < count <= most:
        raise ModelError(f"it has {most} {side}, and of those {count} cannot be kept")
    return side, count, grid


def widths(units: int, multiple: int = 1, steps: int = STEPS) -> list[int]:
    """How many of so many units may be kept: an eighth or more, in `steps` steps of a `multiple`, but not all."""
    step = -(-max(1, units // steps) // multiple) * multiple
    return [count for count in range(step, units, step) if count * LEAST >= units]


def remaining(problem: Problem, side: str, kept: torch.Tensor) -> Problem:
    """What is left of a problem with the units `kept` [k] of its inputs, the weight fitted again, or of its outputs."""
    C, output = problem.C, problem.output
    if side == "inputs":
        linear, W = replace(problem.linear, in_features=len(kept)), fitted(problem.W, kept, C, problem.ridge)
        C = None if C is None else C[kept] if C.ndim == 1 else C[kept[:, None], kept]
    else:
        linear, W = replace(problem.linear, out_features=len(kept)), problem.W[kept]
        if (G := problem.G) is not None:
            output = OutputMetric((BlockRoot(G[kept[:, None], kept][None]),), torch.ones(1).double())
    return replace(problem, linear=linear, weight=lambda: W, metrics=lambda: (C, output), kept=None)


register(Narrow())
