"""The matrices of a factored linear in vLLM: floats, or integers that stay packed in memory.

`packed` chooses by platform: a kernel of vLLM where it has one for the shape, the grid and the dtype; on CPUs those of
``spectrim.kernels`` else. What it declines is unpacked into floats when it is loaded.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.kernels.linear import (
    CPUWNA16LinearKernel,
    MPLinearKernel,
    MPLinearLayerConfig,
    choose_mp_linear_kernel,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import ScalarType

from spectrim.kernels.bits import pack
from spectrim.maths.rotation import BLOCK, matrix, turned
from spectrim.maths.rounding import Grid
from spectrim.serve.shards import take
from spectrim.storage.packed import PackedLinear


class Matrix(nn.Module):
    """A weight [out, in] in floats, for vLLM's unquantized kernels; its values are undefined at first."""

    def __init__(self, out: int, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, inputs, dtype=dtype), requires_grad=False)
        self._method = UnquantizedLinearMethod()

    def put(self, start: int, found: torch.Tensor | PackedLinear, rows: Sequence[range], columns: range) -> None:
        """Copy these rows and columns of a weight, one below the other from `start` on; integers are unpacked."""
        weight = found.weight if isinstance(found, PackedLinear) else found
        part = take(weight, rows)[:, columns.start : columns.stop]
        self.weight.data[start : start + len(part)].copy_(part)

    def prepare(self) -> None:
        """Hand the weight to the kernel, which may lay it out anew."""
        if len(self.weight):  # a process may need no row of a pivoted A'
            self._method.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., in] to [..., out]."""
        y: torch.Tensor = self._method.apply(self, x)
        return y


class PackedMatrix(nn.Module):
    """A weight [out, in] in integers for a kernel of vLLM (see `kernel_for`).

    Its parameters are those in which vLLM loads compressed-tensors, of vLLM's classes: kernels ask these which
    dimension is which. ``weight_packed`` int32 [out, ⌈in · bits / 32⌉], ``weight_scale`` [out, groups] and, on an
    asymmetric grid, ``weight_zero_point`` int32 [out · bits / 32, groups], which is there when all rows are.
    """

    rotation: torch.Tensor | None

    def __init__(self, out: int, inputs: int, grid: Grid, dtype: torch.dtype, kernel: type[MPLinearKernel]) -> None:
        super().__init__()
        self.grid = grid
        # What kernels ask a linear of vLLM.
        self.input_size_per_partition, self.output_partition_sizes = inputs, [out]
        self.params_dtype, self.has_bias, self.bias = dtype, False, None
        groups = 1 if grid.group is None else inputs // grid.group
        words = torch.empty(out, -(-inputs * grid.bits // 32), dtype=torch.int32)
        self.weight_packed = self._words(words, packed_dim=1)
        scale = torch.empty(out, groups, dtype=dtype)
        self.weight_scale = GroupQuantScaleParameter(data=scale, input_dim=1, output_dim=0, weight_loader=_not_loaded)
        # Rows that share a word may come one by one: bytes, until all are there.
        self._zeros = None if grid.symmetric else torch.empty(out, groups, dtype=torch.int8)
        names = "weight_packed", "weight_scale", "weight_zero_point"
        self._kernel = kernel(_config(out, inputs, grid, dtype), *names)
        # Compiled code, and a graph of CUDA, take it from here.
        self.register_buffer("rotation", matrix(dtype) if grid.rotated else None, persistent=False)

    def _words(self, data: torch.Tensor, packed_dim: int) -> PackedvLLMParameter:
        factor = Fraction(32, self.grid.bits)
        dims = {"input_dim": 1, "output_dim": 0, "packed_dim": packed_dim}
        return PackedvLLMParameter(data=data, packed_factor=factor, weight_loader=_not_loaded, **dims)

    def put(self, start: int, found: torch.Tensor | PackedLinear, rows: Sequence[range], columns: range) -> None:
        """Copy these rows and columns of integers, one below the other from `start` on."""
        _part(found, rows, columns).copy_to(start, self.weight_packed.data, self.weight_scale.data, self._zeros)

    def prepare(self) -> None:
        """Hand the integers to the kernel, which lays them out anew."""
        if self._zeros is not None:
            self.weight_zero_point = self._words(pack(self._zeros.T, self.grid.bits).T.contiguous(), packed_dim=0)
            self._zeros = None
        self._kernel.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., in] to [..., out]."""
        y: torch.Tensor = self._kernel.apply_weights(self, x if self.rotation is None else turned(x, self.rotation))
        return y


class OwnMatrix(nn.Module):
    """A weight [out, in] in integers that a PackedLinear runs, on CPUs. `name` is that of no other in the model."""

    def __init__(self, out: int, inputs: int, grid: Grid, dtype: torch.dtype, runtime: str, name: str) -> None:
        super().__init__()
        self.layer = PackedLinear(inputs, out, grid, bias=False, dtype=dtype)
        self._runtime, self._name = runtime, name
        groups = self.layer.weight_scale.shape[1]
        self._zeros = None if grid.symmetric else torch.empty(out, groups, dtype=torch.int8)  # as in PackedMatrix
        # Where compiled code finds it, as it finds vLLM's attention.
        get_current_vllm_config().compilation_config.static_forward_context[name] = self

    def put(self, start: int, found: torch.Tensor | PackedLinear, rows: Sequence[range], columns: range) -> None:
        """Copy these rows and columns of integers, one below the other from `start` on."""
        held = self.layer.weight_packed, self.layer.weight_scale, self._zeros
        _part(found, rows, columns).copy_to(start, *held)

    def prepare(self) -> None:
        """Choose the layout that the kernels read."""
        if self._zeros is not None:
            self.layer.weight_zero_point = pack(self._zeros.T, self.layer.grid.bits).T
            self._zeros = None
        self.layer.run_as(self._runtime)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., in] to [..., out]."""
        # The layer's way depends on the number of rows, which compiled code leaves open.
        if torch.compiler.is_compiling():
            return run_named(x, self.layer.out_features, self._name)
        y: torch.Tensor = self.layer(x)
        return y


@torch.library.custom_op("spectrim::run_named", mutates_args=())
def run_named(x: torch.Tensor, out: int, name: str) -> torch.Tensor:
    """The product of the OwnMatrix `name` of the model that runs, [..., out]; opaque to the compiler."""
    y: torch.Tensor = get_forward_context().no_compile_layers[name].layer(x)
    return y.contiguous()


@run_named.register_fake
def _(x: torch.Tensor, out: int, name: str) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out)


def packed(
    out: int, columns: range, grid: Grid, dtype: torch.dtype, runtime: str, name: str
) -> PackedMatrix | OwnMatrix | None:
    """An empty matrix for these columns of a weight on a grid, in which integers stay packed; None where none can.

    `runtime` is that of the checkpoint: ``reference`` unpacks all. On CPUs, ``auto`` and ``memory`` take vLLM's kernel
    where there is one, and else keep the packed words, unpacking in every pass what no kernel of ours multiplies.
    ``speed`` takes our kernels for bfloat16 first, and unpacks at load what no kernel multiplies.
    """
    whole = math.lcm(grid.group or 1, BLOCK if grid.rotated else 1)  # inputs that go together
    if runtime == "reference" or any(end % whole for end in (columns.start, columns.stop)):
        return None
    here, fast = current_platform.is_cpu(), runtime == "speed"
    own = here and (dtype == torch.bfloat16 or not fast)
    if not (own and fast) and (kernel := kernel_for(out, columns, grid, dtype)) is not None:
        return PackedMatrix(out, len(columns), grid, dtype, kernel)
    return OwnMatrix(out, len(columns), grid, dtype, "speed" if fast else "memory", name) if own else None


def kernel_for(out: int, columns: range, grid: Grid, dtype: torch.dtype) -> type[MPLinearKernel] | None:
    """The kernel of vLLM for these columns of a weight on a grid; None where it has none for this machine.

    All take 16-bit inputs alone. Columns must not begin or end inside a word, nor the outputs' zero points.
    """
    ends = (columns.start, columns.stop) if grid.symmetric else (columns.start, columns.stop, out)
    if dtype not in (torch.float16, torch.bfloat16) or any(end * grid.bits % 32 for end in ends):
        return None
    config = _config(out, len(columns), grid, dtype)
    if current_platform.is_cpu():
        return CPUWNA16LinearKernel if kernel_here() and CPUWNA16LinearKernel.can_implement(config)[0] else None
    try:
        return choose_mp_linear_kernel(config)
    except ValueError:  # its way to say that there is none
        return None


def kernel_here() -> bool:
    """Whether this CPU has vLLM's kernel for integers in the form that it was tested in.

    That is x86 with AVX-512; with AMX the kernel takes another way, which rounds the inputs to 8 bits.
    """
    here = torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported()
    return here and hasattr(torch.ops._C, "cpu_gemm_wna16")


class _Part(NamedTuple):
    words: torch.Tensor  # int32 [rows, words]
    scale: torch.Tensor  # [rows, groups]
    zero: torch.Tensor | None  # int8 [rows, groups]

    def copy_to(self, start: int, words: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None) -> None:
        """Into the rows from `start` on of the tensors of a whole matrix."""
        here = slice(start, start + len(self.words))
        words[here], scale[here] = self.words, self.scale
        if zeros is not None:
            assert self.zero is not None
            zeros[here] = self.zero


def _part(found: Any, rows: Sequence[range], columns: range) -> _Part:
    """These rows and columns of integers, packed; columns begin and end with a group."""
    assert isinstance(found, PackedLinear)
    bits, group = found.grid.bits, found.grid.group
    if columns.start * bits % 32 == columns.stop * bits % 32 == 0 or columns == range(found.in_features):
        words = take(found.weight_packed[:, columns.start * bits // 32 : -(-columns.stop * bits // 32)], rows)
    else:
        words = pack(take(found.codes(), rows)[:, columns.start : columns.stop], bits)
    groups = slice(None) if group is None else slice(columns.start // group, columns.stop // group)
    zeros = found.zeros()
    scale, zero = found.weight_scale[:, groups], None if zeros is None else take(zeros[:, groups], rows)
    return _Part(words, take(scale, rows), zero)


def _config(out: int, inputs: int, grid: Grid, dtype: torch.dtype) -> MPLinearLayerConfig:
    shape = (inputs, out)
    kind = ScalarType.uint(grid.bits, 1 << grid.bits - 1 if grid.symmetric else None)
    return MPLinearLayerConfig(shape, shape, kind, dtype, -1 if grid.group is None else grid.group, not grid.symmetric)


def _not_loaded(*args: Any) -> None:
    """The loader of parameters that no loader of vLLM fills."""
    raise NotImplementedError("the slots of the linear fill its matrices")
