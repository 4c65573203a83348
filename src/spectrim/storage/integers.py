"""A dense weight in integers, in the tensors of compressed-tensors' format ``pack-quantized`` (docs/methods.md, 8)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spectrim.errors import ModelError
from spectrim.linear import Linear
from spectrim.maths.rounding import Grid, Quantized, fitting_group, quantize
from spectrim.recipe import QuantizePart
from spectrim.storage.base import Form, Options, Spec, Tensors, register
from spectrim.storage.packed import PackedLinear
from spectrim.storage.problem import Problem

BITS = (2, 3, 4, 8)  # where the recipe leaves them to the allocation


class Integers(Form):
    """``bits``, ``group`` (inputs that share a scale; None for all inputs of an output), ``symmetric``, ``rotated``."""

    name = "integers"
    marker = "weight_packed"
    searches = True

    def options(self, problem: Problem) -> Options:
        """One option for each number of bits that the recipe allows.

        The predicted error needs no integers: after error feedback the rounding residuals r are as large as those of
        rounding to nearest on the same grid, and the error is ``Σ S_ii² r_ij² T_jj²`` (see
        :mod:`spectrim.maths.rounding`), so that one rounding prices an option.
        """
        linear, rows = problem.linear, list[tuple[int, float, Spec]]()
        for bits in allowed_bits(problem):
            grid = problem.grid(bits, linear.in_features)
            size = grid.nbytes(linear.out_features, linear.in_features, linear.dtype.itemsize)
            rows.append((size, float(problem.noise(problem.W, grid).sum()), grid.spec))
        return Options.listed(self.name, rows)

    def make(self, problem: Problem, spec: Spec) -> Tensors:
        """The weight rounded, with errors fed on in the metrics of the problem."""
        layer = self.build(problem.empty(), spec)
        layer.load(rounded(problem, problem.W, layer.grid, problem.C, problem.G, problem.linear.dtype))
        return layer.state_dict()

    def build(self, linear: nn.Linear, spec: Spec) -> PackedLinear:
        """An empty PackedLinear."""
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        layer = PackedLinear(linear.in_features, linear.out_features, checked_grid(spec), bias=False, **like)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def heads(self, spec: Spec) -> None:
        """None; ModelError for a spec that is no grid."""
        self.grid(spec)

    def grid(self, spec: Spec) -> Grid:
        """The grid of a spec. Raises ModelError for what is none."""
        return checked_grid(spec)

    def least(self, linear: Linear, quantize: QuantizePart) -> int:
        """Bytes of the weight where the recipe has no integers; those of the integers where there is nothing else."""
        if not quantize.plain:
            return linear.nbytes if quantize.bits is None else 0
        if not quantize.takes(linear.role) or not isinstance(quantize.bits, int):
            return linear.nbytes
        grid = Grid(quantize.bits, fitting_group(linear.in_features, quantize.group), quantize.symmetric)
        return grid.nbytes(linear.out_features, linear.in_features, linear.dtype.itemsize)

    def nbytes(self, linear: Linear, spec: Spec) -> int:
        """Bytes of codes, scales, zero points and the shape."""
        return self.grid(spec).nbytes(linear.out_features, linear.in_features, linear.dtype.itemsize)

    def params(self, linear: Linear, spec: Spec) -> int:
        """As many numbers as the weight has."""
        return linear.params


def checked_grid(spec: Any) -> Grid:
    """The grid of a spec. Raises ModelError for what is none."""
    values = dict(spec) if isinstance(spec, Mapping) else {}
    bits, group = values.pop("bits", None), values.pop("group", None)
    flags = [values.pop("symmetric", True), values.pop("rotated", False)]
    whole = all(type(value) is int for value in (bits, 1 if group is None else group))
    plain = not values and all(type(flag) is bool for flag in flags)
    if not plain or not whole or not 2 <= bits <= 8 or (group is not None and group < 1):
        raise ModelError(
            f"{spec} is no grid of integers; give bits (2 to 8), group (a size, or null for one scale by output), "
            "symmetric and rotated (true or false)"
        )
    return Grid(bits, group, *flags)


def allowed_bits(problem: Problem) -> tuple[int, ...]:
    """Numbers of bits that are options."""
    bits = problem.quantize.bits
    if bits is None or not problem.may_be_integers:
        return ()
    return BITS if bits == "auto" else (bits,)


def rounded(
    problem: Problem,
    W: torch.Tensor,
    grid: Grid,
    C: torch.Tensor | None,
    G: torch.Tensor | None,
    dtype: torch.dtype,
) -> Quantized:
    """W on a grid with scales in `dtype`, errors fed on in C and G as the recipe says (see `quantize`)."""
    signed = problem.quantize.signed
    if (damping := problem.dampening(W.shape[1], len(W))) is None:
        return quantize(W, grid, dtype=dtype, signed=signed)
    return quantize(W, grid, C, G, dtype=dtype, damping=damping, signed=signed)


register(Integers())
