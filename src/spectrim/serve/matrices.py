"""The matrices of a factored linear in vLLM: floats, or integers where vLLM has a kernel for them."""

from collections.abc import Sequence
from math import lcm

import torch
from torch import nn
from vllm.model_executor.kernels.linear import CPUWNA16LinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.utils import set_weight_attrs
from vllm.scalar_type import ScalarType

from spectrim.kernels.bits import pack, unpack
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
    """A weight [out, in] in integers of 4 bits, for vLLM's kernel on CPUs; where `has_kernel` says so."""

    weight_zero_point: nn.Parameter
    bias = None  # the kernel may ask

    def __init__(self, out: int, inputs: int, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid = grid
        groups = 1 if grid.group is None else inputs // grid.group
        self._set("weight_packed", torch.empty(out, inputs * grid.bits // 32, dtype=torch.int32), packed_dim=1)
        self._set("weight_scale", torch.empty(out, groups, dtype=dtype))
        if not grid.symmetric:
            self._set("weight_zero_point", torch.empty(out, groups, dtype=torch.int8))  # packed when all is there
        names = "weight_packed", "weight_scale", "weight_zero_point"
        self._kernel = CPUWNA16LinearKernel(_config(out, inputs, grid, dtype), *names)

    def _set(self, name: str, tensor: torch.Tensor, **kind: int) -> None:
        parameter = nn.Parameter(tensor, requires_grad=False)
        set_weight_attrs(parameter, {"output_dim": 0, "input_dim": 1, **kind})
        self.register_parameter(name, parameter)

    def put(self, start: int, found: torch.Tensor | PackedLinear, rows: Sequence[range], columns: range) -> None:
        """Copy these rows and columns of integers, one below the other from `start` on."""
        assert isinstance(found, PackedLinear)
        bits, group = self.grid.bits, self.grid.group
        words = slice(columns.start * bits // 32, columns.stop * bits // 32)
        groups = slice(None) if group is None else slice(columns.start // group, columns.stop // group)
        parts = {"weight_packed": found.weight_packed[:, words], "weight_scale": found.weight_scale[:, groups]}
        if found.weight_zero_point is not None:
            parts["weight_zero_point"] = unpack(found.weight_zero_point.T, bits, found.out_features).T[:, groups]
        for name, tensor in parts.items():
            part = take(tensor, rows)
            self.get_parameter(name).data[start : start + len(part)].copy_(part)

    def prepare(self) -> None:
        """Hand the integers to the kernel, which lays them out anew."""
        if not self.grid.symmetric:
            zero = pack(self.weight_zero_point.data.T.contiguous(), self.grid.bits).T
            self._set("weight_zero_point", zero, packed_dim=0)
        self._kernel.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., in] to [..., out]."""
        y: torch.Tensor = self._kernel.apply_weights(self, x)
        return y


def has_kernel(out: int, columns: range, grid: Grid, dtype: torch.dtype) -> bool:
    """Whether vLLM can multiply by these columns of a weight on a grid without unpacking it.

    Its kernel takes 16-bit inputs alone. Columns must not begin or end inside a word or a group.
    """
    whole = lcm(32 // grid.bits, grid.group or 1)
    return (
        columns.start % whole == columns.stop % whole == 0
        and dtype in (torch.float16, torch.bfloat16)
        and kernel_here()
        and CPUWNA16LinearKernel.can_implement(_config(out, len(columns), grid, dtype))[0]
    )


def kernel_here() -> bool:
    """Whether this machine has vLLM's kernel for integers in the form that it was tested in.

    That is x86 with AVX-512; with AMX the kernel takes another way, which rounds the inputs to 8 bits.
    """
    here = torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported()
    return here and hasattr(torch.ops._C, "cpu_gemm_wna16")


def _config(out: int, inputs: int, grid: Grid, dtype: torch.dtype) -> MPLinearLayerConfig:
    shape = (inputs, out)
    kind = ScalarType.uint(grid.bits, 1 << grid.bits - 1 if grid.symmetric else None)
    return MPLinearLayerConfig(shape, shape, kind, dtype, -1 if grid.group is None else grid.group, not grid.symmetric)
