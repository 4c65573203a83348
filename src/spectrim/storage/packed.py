"""Integer linears, in the tensors of compressed-tensors' format ``pack-quantized``.

compressed-tensors is imported where it is used: it imports transformers' models, after which this module is imported to
register the format (see ``spectrim.registration``).
"""

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import nn

from spectrim.errors import CheckpointError, ModelError
from spectrim.kernels import cuda
from spectrim.kernels.bits import pack, unpack
from spectrim.kernels.cpu import (
    INT4_ROWS,
    PART,
    int4_codes,
    int4_group,
    int4_layout,
    int4_product,
    int8_codes,
    int8_fits,
    int8_layout,
    int8_product,
    int8_rows,
    layout_scales,
    part_rows,
    planes_codes,
    planes_layout,
    planes_product,
)
from spectrim.maths.rotation import BLOCK, turned, turned_back
from spectrim.maths.rounding import Grid, Quantized
from spectrim.storage.base import StoredLayer

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme


class PackedLinear(StoredLayer):
    """A linear layer whose weight is integers: ``y = W x + bias``.

    Buffers: ``weight_packed`` int32 [out, ⌈in · bits / 32⌉], ``weight_scale`` [out, groups], ``weight_shape`` int64 [2]
    and, on an asymmetric grid, ``weight_zero_point`` int32 [⌈out · bits / 32⌉, groups]. Scales start as NaN, so that a
    layer that nobody filled shows in the first logits. Raises ModelError for a group that does not divide the inputs.

    W is unpacked whenever it is used, unless `run_as` has put another ``layout`` in the place of the packed words, in
    which a kernel multiplies inputs (on a CPU few rows of them) with the integers themselves. The state dict is the
    same.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_shape: torch.Tensor
    weight_zero_point: torch.Tensor | None
    layout_codes: torch.Tensor | None  # of another layout than packed words,
    layout_scales: torch.Tensor | None  # with its scales and offsets,
    layout_zeros: torch.Tensor | None  # and on a GPU zero points
    layout_locks: torch.Tensor  # and what its programs count in

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: Grid,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if grid.group is not None and in_features % grid.group:
            raise ModelError(f"groups of {grid.group} do not divide {in_features} inputs; choose another group")
        if grid.rotated and in_features % BLOCK:
            raise ModelError(f"{in_features} inputs cannot be rotated {BLOCK} at a time; take the rotation out")
        self.in_features, self.out_features, self.grid = in_features, out_features, grid
        self.layout = "packed"
        self.most_rows: float = 0  # of inputs, up to which a kernel multiplies them with the integers
        groups = 1 if grid.group is None else in_features // grid.group
        words, high = -(-in_features * grid.bits // 32), -(-out_features * grid.bits // 32)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("weight_packed", torch.zeros(out_features, words, dtype=torch.int32, device=device))
        self.register_buffer("weight_scale", torch.full((out_features, groups), torch.nan, **like))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        zero = None if grid.symmetric else torch.zeros(high, groups, dtype=torch.int32, device=device)
        self.register_buffer("weight_zero_point", zero)
        self.bias = nn.Parameter(torch.full((out_features,), torch.nan, **like)) if bias else None

    @property
    def form(self) -> str:
        """Integers."""
        return "integers"

    @property
    def spec(self) -> dict[str, Any]:
        """The grid."""
        return self.grid.spec

    def product(self) -> torch.Tensor:
        """As `dense`; raises ModelError where the layer is offloaded."""
        self.check_values()
        return self.dense()

    def dense(self) -> torch.Tensor:
        """The weight [out, in] in the dtype of the scales."""
        return turned_back(self.unpacked()) if self.grid.rotated else self.unpacked()

    def read(self, input: torch.Tensor) -> torch.Tensor:
        """Inputs [..., in] as the integers multiply them: rotated, where the grid says so."""
        return turned(input) if self.grid.rotated else input

    def codes(self, dtype: torch.dtype = torch.int8, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The integers [out, in], as numbers of a dtype; from row `start`, of a part (`part_rows`), to `stop`."""
        stop = self.out_features if stop is None else stop
        if self.layout in ("packed", "humming"):
            return unpack(self._words()[start:stop], self.grid.bits, self.in_features, dtype)
        held, shape = self.layout_codes, (stop - start, self.in_features)
        assert held is not None
        if self.layout == "int8":
            return int8_codes(held[:, start:stop]).to(dtype)
        if self.layout == "planes":
            rows = part_rows(self.out_features, self.in_features)
            return planes_codes(held[start // rows : -(-stop // rows)], *shape, dtype)
        return int4_codes(held[start:], *shape, dtype)

    def zeros(self) -> torch.Tensor | None:
        """The zero points, int8 [out, groups]; None where all are zero."""
        zero = self.weight_zero_point
        return None if zero is None else unpack(zero.T, self.grid.bits, self.out_features).T

    def unpacked(self) -> torch.Tensor:
        """What the integers [out, in] stand for, in the dtype of the scales: the weight on what `read` gives."""
        scale, zero = self.weight_scale, self.zeros()
        if cuda.takes(scale):
            dense = cuda.unpacked(self._words(), scale, zero, self.grid.bits, self.in_features)
            if dense is not None:
                return dense
        return numbers(self.codes(scale.dtype), scale, zero)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # as nn.Linear calls it
        """Map inputs [..., in] to [..., out] in the dtype of the scales."""
        rows, input = input.numel() // self.in_features, self.read(input)
        held: dict[str, Any] = self._buffers  # from which a tensor is read in less time than as an attribute
        if not 0 < rows <= self.most_rows or input.dtype != held["weight_scale"].dtype or input.requires_grad:
            return self._unpack_and_multiply(input)
        y = self._product(input.reshape(rows, self.in_features)).view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _unpack_and_multiply(self, input: torch.Tensor) -> torch.Tensor:
        """``W x + bias`` by the weight in floats; on a CPU in parts, since memory for all of it takes longer to get."""
        scale, bias, out = self.weight_scale, self.bias, self.out_features
        if scale.device.type != "cpu" or out * self.in_features <= PART:
            return nn.functional.linear(input, self.unpacked(), bias)
        step, zero, found = part_rows(out, self.in_features), self.zeros(), []
        for start in range(0, out, step):
            stop = min(start + step, out)
            part = slice(start, stop)
            W = numbers(self.codes(scale.dtype, start, stop), scale[part], None if zero is None else zero[part])
            found.append(nn.functional.linear(input, W, None if bias is None else bias[part]))
        return torch.cat(found, dim=-1)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """``x Wᵀ`` [rows, out] of x [rows, in] by a kernel that reads the layout."""
        if self.layout == "humming":
            layout = self.gpu_layout
            assert layout is not None
            return cuda.product(x, layout)
        held: dict[str, Any] = self._buffers
        codes, scales = held["layout_codes"], held["layout_scales"]
        if self.layout == "int8":
            return int8_product(x, codes, scales)
        if self.layout == "planes":
            return planes_product(x, codes, scales, self.zeros(), self.out_features)
        return int4_product(x, codes, scales, self.out_features)

    @torch.no_grad()
    def run_as(self, runtime: str) -> str:
        """Choose how the layer runs; returns the layout.

        ``reference``: it is unpacked in every pass. ``speed``: a kernel multiplies few rows of inputs with integers in
        a layout of its own, which takes the place of the packed words ("int4", "int8"; bfloat16 on a CPU whose layout
        is known); integers of 2 and 3 bits take the room of 4. ``memory``: the same, but integers of 2 and 3 bits keep
        their room and are widened in every pass ("planes"). ``auto`` is ``speed``. On a GPU, in float16 and bfloat16,
        all of these are the kernels of humming-kernels ("humming") where they take the weight (see
        `kernels.cuda.prepare`); the words then wait in the host's memory.
        """
        self._pack_again()
        self.runtime = runtime
        grid, scale = self.grid, self.weight_scale
        if runtime != "reference" and cuda.takes(scale):
            return self._run_on_gpu()
        if runtime == "reference" or scale.device.type != "cpu" or scale.dtype != torch.bfloat16:
            return self.layout
        if grid.bits == 8 and int8_fits(self.in_features, scale.shape[1]):
            codes, scales = int8_layout(self.codes(), scale, self.zeros())
            self.layout = "int8"
        elif grid.bits > 4 or int4_group(self.in_features, grid.group) is None:
            return self.layout
        elif grid.bits < 4 and runtime == "memory":
            codes, scales = planes_layout(self.codes(), scale, grid.bits)
            self.layout = "planes"
        else:
            codes, scales = int4_layout(self.codes(), scale, self.zeros())
            self.layout = "int4"
        self.register_buffer("layout_codes", codes, persistent=False)
        self.register_buffer("layout_scales", scales, persistent=False)
        self.weight_packed = self.weight_packed.new_empty(0)
        pairs = scales.transpose(1, 2) if self.layout == "int8" else scales
        self.weight_scale = layout_scales(pairs, *scale.shape)
        self.most_rows = int8_rows(scale.shape[1]) if self.layout == "int8" else INT4_ROWS
        return self.layout

    def _run_on_gpu(self) -> str:
        """Put humming's layout in the place of the packed words where it takes them; returns the layout."""
        words, shape = self.weight_packed, (self.out_features, self.in_features)
        grid = self.grid.bits, self.grid.group
        found = cuda.prepare(words, self.weight_scale, self.weight_zero_point, grid, shape, self.unpacked)
        if found is not None:
            self.layout, self._host_words, self.most_rows = "humming", words.cpu(), inf
            self.gpu_layout = found
            self.weight_packed = words.new_empty(0)
        return self.layout

    @property
    def gpu_layout(self) -> cuda.Layout | None:
        """humming's layout of the weight; None where the layer runs in another one."""
        if self.layout != "humming":
            return None
        return cuda.Layout(self._humming, *(self._buffers[f"layout_{name}"] for name in cuda.HELD))  # type: ignore[arg-type]

    @gpu_layout.setter
    def gpu_layout(self, found: cuda.Layout) -> None:
        self._humming = found.config
        for name in cuda.HELD:
            self.register_buffer(f"layout_{name}", getattr(found, name), persistent=False)

    def _words(self) -> torch.Tensor:
        """The packed words on the device of the scales."""
        return self._host_words.to(self.weight_scale.device) if self.layout == "humming" else self.weight_packed

    def _pack_again(self) -> None:
        """Put the packed words back in the place of another layout."""
        if self.layout == "humming":
            self.weight_packed = self._words()
            del self._humming, self._host_words, self.layout_zeros, self.layout_locks
        elif self.layout != "packed":
            self.weight_packed = pack(self.codes(), self.grid.bits)
            self.weight_scale = self.weight_scale.contiguous()
        if self.layout != "packed":
            self.layout, self.most_rows = "packed", 0
            del self.layout_codes, self.layout_scales

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout == "humming":
            destination[f"{prefix}weight_packed"] = self._words()
        elif self.layout != "packed":
            destination[f"{prefix}weight_packed"] = pack(self.codes(), self.grid.bits)
            destination[f"{prefix}weight_scale"] = self.weight_scale.contiguous()

    @torch.no_grad()
    def load(self, found: Quantized) -> None:
        """Pack codes [out, in] on this layer's grid. Raises ModelError for another shape or grid."""
        if found.grid != self.grid or found.codes.shape != (self.out_features, self.in_features):
            raise ModelError(
                f"codes of shape {list(found.codes.shape)} on {found.grid} do not fit a layer that takes "
                f"{[self.out_features, self.in_features]} on {self.grid}"
            )
        self.run_as("reference")
        self.weight_packed.copy_(pack(found.codes, self.grid.bits))
        self.weight_scale.copy_(found.scale)
        if self.weight_zero_point is not None:
            assert found.zero is not None
            self.weight_zero_point.copy_(pack(found.zero.T, self.grid.bits).T)

    def loaded(self) -> None:
        """Raise ModelError where the stored shape is another one than the layer's."""
        shape = self.weight_shape
        if not shape.is_meta and shape.tolist() != [self.out_features, self.in_features]:
            raise ModelError(f"weight_shape: it is {shape.tolist()}, not {[self.out_features, self.in_features]}")

    def extra_repr(self) -> str:
        """Shape of the layer, as ``nn.Linear`` shows its own, and its grid."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.grid.bits}, group={self.grid.group}"
            + ", symmetric=False" * (not self.grid.symmetric)
            + ", rotated=True" * self.grid.rotated
        )


def numbers(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """What codes [rows, in], in the dtype of the scales, stand for; scales and zero points are [rows, groups]."""
    codes = codes.unflatten(1, (scale.shape[1], -1))
    if zero is not None:  # at most 255, which floats of 16 bits hold exactly
        codes = codes - zero[..., None].to(scale.dtype)
    return (codes * scale[..., None]).flatten(1)


def scheme(grid: Grid, targets: list[str]) -> "QuantizationScheme":
    """What compressed-tensors calls a grid."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy

    weights = QuantizationArgs(
        num_bits=grid.bits,
        symmetric=grid.symmetric,
        strategy=QuantizationStrategy.CHANNEL if grid.group is None else QuantizationStrategy.GROUP,
        group_size=grid.group,
    )
    return QuantizationScheme(targets=targets, weights=weights)


def inner_config(grids: Mapping[str, Grid]) -> dict[str, Any]:
    """The compressed-tensors config (JSON types) of linears on grids, by checkpoint name; each is named as a target."""
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    targets: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        targets.setdefault(grid, []).append(name)
    config = QuantizationConfig(
        config_groups={f"group_{n}": scheme(grid, sorted(names)) for n, (grid, names) in enumerate(targets.items())},
        format=CompressionFormat.pack_quantized.value,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    return config.model_dump(mode="json")


# Entries of a compressed-tensors config that are read, or say nothing of the weights.
_INNER = {"config_groups", "quant_method", "format", "quantization_status", "global_compression_ratio", "version"}


def inner_grids(config: Any) -> dict[str, Grid]:
    """The inverse of `inner_config`: grids by checkpoint name.

    Raises CheckpointError for a config that compressed-tensors refuses, and for one with more than packed integer
    weights of named linears.
    """
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStrategy

    try:
        read = QuantizationConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        detail = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise CheckpointError(
            f"the inner quantization_config is none of compressed-tensors ({detail}); copy config.json again"
        ) from error
    more = {key for key, value in config.items() if value} - _INNER  # caches, sparsity, rotations, names to leave out
    grids: dict[str, Grid] = {}
    for group in read.config_groups.values():
        assert isinstance(group, QuantizationScheme)
        weights = group.weights
        fits = read.format == CompressionFormat.pack_quantized.value and weights is not None
        plain = fits and weights.type == "int" and not weights.dynamic and not weights.actorder
        if weights is None or not plain or group.input_activations or group.output_activations or more:
            raise CheckpointError(
                "the inner quantization_config holds more than packed integer weights; load such a checkpoint with "
                "compressed-tensors itself"
            )
        size = weights.group_size if weights.strategy == QuantizationStrategy.GROUP else None
        known = weights.strategy == QuantizationStrategy.CHANNEL or size is not None
        if not known or weights.num_bits not in range(2, 9) or (size is not None and size < 1):
            raise CheckpointError(
                f"the inner quantization_config asks for {weights.num_bits} bits by {weights.strategy} of "
                f"{weights.group_size}; spectrim reads 2 to 8 bits by channel or group: copy config.json again"
            )
        if repeated := sorted({name for name in group.targets if name in grids or group.targets.count(name) > 1}):
            raise CheckpointError(
                f"the inner quantization_config names {repeated[0]!r} twice; copy the checkpoint's config.json again"
            )
        grids |= dict.fromkeys(group.targets, Grid(weights.num_bits, size, weights.symmetric))
    return grids
