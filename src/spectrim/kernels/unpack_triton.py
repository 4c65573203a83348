"""Integers of packed words to a dense weight in one pass over memory, as a Triton kernel; needs triton.

The reference is `bits.unpack` and a product with the scales (`PackedLinear.unpacked`), which it equals bit for bit.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 4, 256  # of the weight, that one program writes


@triton.jit
def unpack_kernel(
    words,
    scales,
    zeros,
    weight,
    out,
    size,
    row_words,
    groups,
    group,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of the weight; the arguments are those of `unpack_weight`."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (i < out) & (j < size)
    at = i.to(tl.int64) * row_words + j * BITS // 32
    shift = j * BITS % 32
    code = tl.load(words + at, inside, 0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:  # a code may go on in the next word
        over = inside & (shift + BITS > 32)
        code |= tl.load(words + at + 1, over, 0).to(tl.uint32, bitcast=True) << ((32 - shift) % 32)
    code = (code & ((1 << BITS) - 1)).to(tl.int32) - (1 << (BITS - 1))
    place = i * groups + j // group
    if HAS_ZEROS:
        code -= tl.load(zeros + place, inside, 0).to(tl.int32)
    value = code.to(tl.float32) * tl.load(scales + place, inside, 0.0).to(tl.float32)
    tl.store(weight + i.to(tl.int64) * size + j, value.to(weight.dtype.element_ty), inside)


def unpack_weight(
    words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, size: int
) -> torch.Tensor:
    """The weight [out, in] in the dtype of the scales.

    Args:
        words: int32 [out, ⌈in · bits / 32⌉], contiguous, as `bits.pack` makes them.
        scales: [out, groups], float16, bfloat16 or float32.
        zeros: zero points, int8 [out, groups]; None where all are zero.
        bits: 2 to 8.
        size: inputs.
    """
    out, groups = scales.shape
    weight = scales.new_empty(out, size)
    grid = (triton.cdiv(out, ROWS), triton.cdiv(size, COLUMNS))
    with torch.cuda.device_of(words):  # Triton starts its programs on the current device
        unpack_kernel[grid](
            words,
            scales.contiguous(),
            None if zeros is None else zeros.contiguous(),
            weight,
            out,
            size,
            words.shape[1],
            groups,
            size // groups,
            BITS=bits,
            HAS_ZEROS=zeros is not None,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
    return weight
