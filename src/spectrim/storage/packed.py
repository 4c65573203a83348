"""Integer linears, in the tensors of compressed-tensors' format ``pack-quantized``.

The layout is that of compressed-tensors from 0.18 on, whatever release is installed, so that its own loader,
transformers' and vLLM's read the same weight. Release 0.17, which vLLM 0.32 asks for, has the same layout for integers
of 4 and 8 bits, but leaves bits of every word unused for those of 3.

compressed-tensors is imported where it is used: it imports transformers' models, after which this module is imported to
register the format (see ``spectrim.registration``).
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import nn

from spectrim.errors import CheckpointError, ModelError
from spectrim.maths.rounding import Grid, Quantized
from spectrim.storage.base import StoredLayer

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme


class PackedLinear(StoredLayer):
    """A linear layer whose weight is integers: ``y = W x + bias`` with W unpacked whenever it is used.

    Buffers: ``weight_packed`` int32 [out, ⌈in · bits / 32⌉], ``weight_scale`` [out, groups], ``weight_shape`` int64 [2]
    and, on an asymmetric grid, ``weight_zero_point`` int32 [⌈out · bits / 32⌉, groups]. Scales start as NaN, so that a
    layer that nobody filled shows in the first logits. Raises ModelError for a group that does not divide the inputs.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_shape: torch.Tensor
    weight_zero_point: torch.Tensor | None

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
        self.in_features, self.out_features, self.grid = in_features, out_features, grid
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
        return asdict(self.grid)

    def product(self) -> torch.Tensor:
        """As `unpacked`; raises ModelError where the layer is offloaded."""
        self.check_values()
        return self.unpacked()

    def unpacked(self) -> torch.Tensor:
        """The weight [out, in] in the dtype of the scales."""
        scale = self.weight_scale
        codes = unpack(self.weight_packed, self.grid.bits, self.in_features).to(scale.dtype)
        codes = codes.unflatten(1, (scale.shape[1], -1))  # [out, groups, group]
        if self.weight_zero_point is not None:
            zero = unpack(self.weight_zero_point.T, self.grid.bits, self.out_features).T
            codes = codes - zero.to(scale.dtype)[..., None]
        return (codes * scale[..., None]).flatten(1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # as nn.Linear calls it
        """Map inputs [..., in] to [..., out] in the dtype of the scales."""
        return nn.functional.linear(input, self.unpacked(), self.bias)

    @torch.no_grad()
    def load(self, found: Quantized) -> None:
        """Pack codes [out, in] on this layer's grid. Raises ModelError for another shape or grid."""
        if found.grid != self.grid or found.codes.shape != (self.out_features, self.in_features):
            raise ModelError(
                f"codes of shape {list(found.codes.shape)} on {found.grid} do not fit a layer that takes "
                f"{[self.out_features, self.in_features]} on {self.grid}"
            )
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
            f"bits={self.grid.bits}, group={self.grid.group}" + ", symmetric=False" * (not self.grid.symmetric)
        )


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words int32 [rows, ⌈columns · bits / 32⌉] of signed codes int8 [rows, columns], one row after the other."""
    if 32 % bits == 0:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        return pack_to_int32(codes, bits)
    # Eight codes are `bits` bytes; a word has its low byte first.
    count = codes.shape[1]
    eights = nn.functional.pad(codes.long() + (1 << bits - 1), (0, -count % 8)).unflatten(1, (-1, 8))
    joined = (eights << _steps(8, bits, eights)).sum(2, keepdim=True)
    stream = (joined >> _steps(bits, 8, joined) & 255).to(torch.uint8).flatten(1)
    found = stream.new_zeros(len(codes), -(-count * bits // 32) * 4)
    size = min(stream.shape[1], found.shape[1])
    found[:, :size] = stream[:, :size]
    return found.view(torch.int32)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack`: codes int8 [rows, count]."""
    words = words.flatten().view(words.shape)  # a single column has any stride, and its bytes need one of 1
    if 32 % bits == 0:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        return unpack_from_int32(words, bits, torch.Size((len(words), count)))
    stream = words.view(torch.uint8)
    kind = torch.int32 if bits < 4 else torch.int64
    groups = nn.functional.pad(stream, (0, -stream.shape[1] % bits)).unflatten(1, (-1, bits)).to(kind)
    joined = (groups << _steps(bits, 8, groups)).sum(2, keepdim=True, dtype=kind)
    codes = joined >> _steps(8, bits, joined) & (1 << bits) - 1
    return (codes.flatten(1)[:, :count] - (1 << bits - 1)).to(torch.int8)


def _steps(count: int, step: int, like: torch.Tensor) -> torch.Tensor:
    return step * torch.arange(count, dtype=like.dtype, device=like.device)


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
