"""torch's matrix products of bfloat16 inputs and integer weights on a CPU, for few rows of inputs.

Both take a layout that is made once, when a model is loaded, and that takes the place of the packed words:

- 4 bits, and fewer widened into it: ``_weight_int4pack_mm_for_cpu``, one scale and offset for every group of inputs.
  Rows of blocks of as many outputs as two vector registers hold lie column after column, which `int4_codes` undoes.
- 2 and 3 bits in their own room: bit planes of that layout, of which every product widens a part that a cache holds.
- 8 bits: ``_weight_int8pack_mm``, a product for each group of inputs, on the codes as they are.

For more rows than `INT4_ROWS` and `int8_rows`, unpacking once and a dense product take less time.
"""

from functools import cache

import torch

INT4_ROWS = 64  # of inputs, up to which the 4-bit product is faster than unpacking
_BLOCKS = (64, 32, 16)  # outputs of one block of the 4-bit layout: AVX-512, AVX2, others
_OUTPUTS = 64  # outputs are padded to a multiple of this
_GROUPS = (32, 64, 128, 256)  # sizes that the 4-bit product takes
PART = 1 << 22  # weights that are widened or unpacked at once, so that caches hold them
_NIBBLES = 0x1111111111111111  # a 1 in every place of a word


def part_rows(out: int, size: int) -> int:
    """Rows of each part of a weight [out, size] that is widened or unpacked part by part, a multiple of 64."""
    parts = -(-out * size // PART)
    return -(-out // parts // _OUTPUTS) * _OUTPUTS


def int8_rows(groups: int) -> int:
    """Rows of inputs up to which the 8-bit product, which runs once for each group, is faster than unpacking."""
    return max(4, min(32, 64 // groups))


def int4_group(size: int, group: int | None) -> int | None:
    """The group size in which the 4-bit product runs a weight of `size` inputs; None where it cannot."""
    fitting = [width for width in _GROUPS if size % width == 0 and (group or size) % width == 0]
    return max(fitting, default=None) if _block() else None


def int4_layout(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, outputs: int = _OUTPUTS
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `int4_product` takes, of codes int8 [out, in] in −8 … 7 with scales [out, groups] and zero points.

    Returns bytes uint8 [rows, in / 2], rows being the outputs padded to a multiple of `outputs`, and bfloat16
    [in / width, rows, 2] of scales and offsets.
    """
    out, size = codes.shape
    width = int4_group(size, size // scale.shape[1])
    assert width is not None
    more = -out % outputs
    words = torch.nn.functional.pad(codes, (0, 0, 0, more)).int() + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(words, 1)
    offset = torch.zeros_like(scale) if zero is None else -zero.to(scale.dtype) * scale
    pairs = torch.stack([scale, offset], dim=2).repeat_interleave(size // width // scale.shape[1], dim=1)
    pairs = torch.nn.functional.pad(pairs, (0, 0, 0, 0, 0, more)).transpose(0, 1)
    return packed, pairs.to(torch.bfloat16).contiguous()


def int4_product(x: torch.Tensor, packed: torch.Tensor, pairs: torch.Tensor, out: int) -> torch.Tensor:
    """``x Wᵀ`` of x bfloat16 [rows, in], [rows, out]."""
    group = x.shape[1] // len(pairs)
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, pairs)
    return y if y.shape[1] == out else y[:, :out]


def int4_codes(packed: torch.Tensor, out: int, size: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """The codes [out, in] of a layout, or of its first `out` rows, as numbers of a dtype."""
    block = _block()
    assert block is not None
    return _unpacked(packed[: -(-out // _OUTPUTS) * _OUTPUTS], block, size, dtype)[:out]


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


def int4_codes_of(packed: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    """The codes int8 [n, in] of some rows int64 [n] of a layout."""
    block = _block()
    assert block is not None
    half, place = block // 2, rows % block
    found = packed.view(-1, size, half)[rows // block, :, place % half]  # [n, in]
    return (found >> (4 * (place >= half)).to(torch.uint8)[:, None] & 15).to(torch.int8) - 8


def planes_layout(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `planes_product` takes, of codes int8 [out, in] of 2 or 3 bits with scales [out, groups].

    Returns words int64 [parts, bits, in · rows / 64] of parts of equally many rows, and scales bfloat16 [in / width,
    rows of all parts, 1]. A part's first two planes hold the low two bits of all numbers of its 4-bit layout, those of
    its second half above those of its first; the third holds the high bits of its quarters.
    """
    out, size = codes.shape
    rows = part_rows(out, size)
    packed, pairs = int4_layout(codes, scale, None, rows)
    words = packed.view(torch.int64).view(-1, 4, size * rows // 64) - _least(bits)
    low, halves = 3 * _NIBBLES, words.unflatten(1, (2, 2))
    planes = halves[:, 0] & low | (halves[:, 1] & low) << 2
    if bits == 3:
        quarters = [(words[:, quarter] >> 2 & _NIBBLES) << quarter for quarter in range(4)]
        high = quarters[0] | quarters[1] | quarters[2] | quarters[3]
        planes = torch.cat([planes, high[:, None]], dim=1)
    return planes, pairs[..., :1].contiguous()


def planes_product(
    x: torch.Tensor, planes: torch.Tensor, scales: torch.Tensor, zero: torch.Tensor | None, out: int
) -> torch.Tensor:
    """``x Wᵀ`` of x bfloat16 [rows, in], [rows, out]; zero points are int8 [out, groups]."""
    if zero is None:
        pairs = torch.nn.functional.pad(scales, (0, 1))
    else:
        each = zero.T.repeat_interleave(len(scales) // zero.shape[1], dim=0).to(scales.dtype)
        offsets = torch.nn.functional.pad(each, (0, scales.shape[1] - out))[..., None] * -scales
        pairs = torch.cat([scales, offsets], dim=2)
    size, rows = x.shape[1], scales.shape[1] // len(planes)
    parts = zip(planes, pairs.split(rows, dim=1), strict=True)
    found = [int4_product(x, _widened(part, size), some.contiguous(), rows) for part, some in parts]
    return (found[0] if len(found) == 1 else torch.cat(found, dim=1))[:, :out]


def planes_codes(planes: torch.Tensor, out: int, size: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """The codes [out, in] of a layout, or of its first `out` rows, as numbers of a dtype."""
    return int4_codes(torch.cat([_widened(part, size) for part in planes]), out, size, dtype)


def _widened(planes: torch.Tensor, size: int) -> torch.Tensor:
    """The 4-bit layout uint8 [rows, size / 2] of one part's planes int64 [bits, n]."""
    low = planes[:2]
    words = torch.cat([low, low >> 2]).bitwise_and_(3 * _NIBBLES)
    for quarter in range(4 if len(planes) == 3 else 0):
        high = planes[2] << 2 - quarter if quarter < 3 else planes[2] >> 1
        words[quarter] |= high.bitwise_and_(4 * _NIBBLES)
    return words.add_(_least(len(planes))).view(torch.uint8).view(-1, size // 2)


def _least(bits: int) -> int:
    """The least number that codes of so many bits have in the 4-bit layout, in every place of a word of 64 bits."""
    return (8 - (1 << bits - 1)) * _NIBBLES


def layout_scales(pairs: torch.Tensor, out: int, groups: int) -> torch.Tensor:
    """The scales [out, groups] of a layout in which scales and offsets lie side by side, as a view."""
    return pairs[:: len(pairs) // groups, :out, 0].T


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
    """The codes int8 [out, in] of a layout, or of those rows of it that are given."""
    return codes.transpose(0, 1).flatten(1)
