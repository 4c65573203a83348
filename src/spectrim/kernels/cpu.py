"""torch's matrix products of bfloat16 inputs and integer weights on a CPU, for few rows of inputs.

Both take a layout that is made once, when a model is loaded, and that takes the place of the packed words:

- 4 bits, and fewer widened into it: ``_weight_int4pack_mm_for_cpu``, one scale and offset for every group of inputs.
  Rows of blocks of as many outputs as two vector registers hold lie column after column, which `int4_codes` undoes.
- 8 bits: ``_weight_int8pack_mm``, a product for each group of inputs, on the codes as they are.

For more rows than `INT4_ROWS` and `int8_rows`, unpacking once and a dense product take less time.
"""

from functools import cache

import torch

INT4_ROWS = 64  # of inputs, up to which the 4-bit product is faster than unpacking
_BLOCKS = (64, 32, 16)  # outputs of one block of the 4-bit layout: AVX-512, AVX2, others
_OUTPUTS = 64  # outputs are padded to a multiple of this
_GROUPS = (32, 64, 128, 256)  # sizes that the 4-bit product takes


def int8_rows(groups: int) -> int:
    """Rows of inputs up to which the 8-bit product, which runs once for each group, is faster than unpacking."""
    return max(4, min(32, 64 // groups))


def int4_group(size: int, group: int | None) -> int | None:
    """The group size in which the 4-bit product runs a weight of `size` inputs; None where it cannot."""
    fitting = [width for width in _GROUPS if size % width == 0 and (group or size) % width == 0]
    return max(fitting, default=None) if _block() else None


def int4_layout(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `int4_product` takes, of codes int8 [out, in] in −8 … 7 with scales [out, groups] and zero points.

    Returns bytes uint8 [outputs, in / 2], outputs padded, and bfloat16 [in / width, outputs, 2] of scales and offsets.
    """
    out, size = codes.shape
    width = int4_group(size, size // scale.shape[1])
    assert width is not None
    rows = -out % _OUTPUTS
    words = torch.nn.functional.pad(codes, (0, 0, 0, rows)).int() + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(words, 1)
    offset = torch.zeros_like(scale) if zero is None else -zero.to(scale.dtype) * scale
    pairs = torch.stack([scale, offset], dim=2).repeat_interleave(size // width // scale.shape[1], dim=1)
    pairs = torch.nn.functional.pad(pairs, (0, 0, 0, 0, 0, rows)).transpose(0, 1)
    return packed, pairs.to(torch.bfloat16).contiguous()


def int4_product(x: torch.Tensor, packed: torch.Tensor, pairs: torch.Tensor, out: int) -> torch.Tensor:
    """``x Wᵀ`` of x bfloat16 [rows, in], [rows, out]."""
    group = x.shape[1] // len(pairs)
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, pairs)
    return y[:, :out]


def int4_codes(packed: torch.Tensor, out: int, size: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """The codes [out, in] of a layout, as numbers of a dtype."""
    block = _block()
    assert block is not None
    return _unpacked(packed, block, size, dtype)[:out]


def _unpacked(packed: torch.Tensor, block: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Codes −8 … 7 [outputs, in] of a layout in blocks of so many outputs."""
    columns = packed.view(-1, size, block // 2)  # [blocks, in, half a block]
    rows = columns.transpose(1, 2).contiguous()  # two codes in a byte: the only copy that jumps
    signed = rows.bitwise_xor_(0x88).view(torch.int8)  # from 0 … 15 to numbers of four bits with a sign
    codes = packed.new_empty(len(rows), 2, block // 2, size, dtype=dtype)
    codes[:, 0], codes[:, 1] = (signed << 4) >> 4, signed >> 4
    return codes.view(-1, size)


@cache
def _block() -> int | None:
    """Outputs of one block of this CPU's layout; None where it is one that `int4_codes` does not know."""
    codes = torch.randint(0, 16, (2 * _OUTPUTS, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (RuntimeError, NotImplementedError):
        return None
    for block in _BLOCKS:
        if torch.equal(_unpacked(packed, block, codes.shape[1], torch.int32) + 8, codes):
            return block
    return None


def int8_fits(size: int, groups: int) -> bool:
    """Whether the 8-bit product takes a weight of `size` inputs; it reads 16 at once, also beyond the end."""
    return size // groups % 16 == 0


def int8_layout(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `int8_product` takes, of codes int8 [out, in] with scales [out, groups] and zero points.

    Returns codes int8 [groups, out, width] and scales, with offsets where there are zero points, [groups, 1 or 2, out].
    """
    parts = codes.unflatten(1, (scale.shape[1], -1)).transpose(0, 1).contiguous()
    pairs = [scale] if zero is None else [scale, -zero.to(scale.dtype) * scale]
    return parts, torch.stack(pairs).permute(2, 0, 1).contiguous()


def int8_product(x: torch.Tensor, codes: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """``x Wᵀ`` of x bfloat16 [rows, in], [rows, out]: a product for each group, added up in float32."""
    parts = x.unflatten(1, (len(codes), -1)).transpose(0, 1).contiguous()  # [groups, rows, width]
    product = torch.ops.aten._weight_int8pack_mm
    if len(codes) == 1:
        y: torch.Tensor = product(parts[0], codes[0], pairs[0, 0])
    else:
        y = torch.stack([product(part, *rest) for part, *rest in zip(parts, codes, pairs[:, 0], strict=True)])
        y = y.float().sum(0)
    if pairs.shape[1] > 1:
        y = y.float() + parts.float().sum(2).T @ pairs[:, 1].float()  # an offset meets the sum of its inputs
    return y.to(x.dtype)


def int8_codes(codes: torch.Tensor) -> torch.Tensor:
    """The codes int8 [out, in] of a layout."""
    return codes.transpose(0, 1).flatten(1)
