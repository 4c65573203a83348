"""Words of 32 bits against compressed-tensors, and against codes read bit by bit."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from spectrim.kernels.bits import pack, unpack


@st.composite
def integers(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    bits, rows, columns = draw(st.integers(2, 8)), draw(st.integers(1, 5)), draw(st.integers(1, 70))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return bits, torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, columns), generator=seed, dtype=torch.int8)


def bit_by_bit(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes from the binary digits of a row, lowest first."""
    rows = []
    for row in words.tolist():
        digits = "".join(f"{word % 2**32:032b}"[::-1] for word in row)
        rows.append([int(digits[i * bits : (i + 1) * bits][::-1], 2) - (1 << bits - 1) for i in range(count)])
    return torch.tensor(rows, dtype=torch.int8)


@given(integers())
def test_unpack_reads_what_pack_wrote_and_what_stands_there(case):
    bits, codes = case
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (len(codes), -(-codes.shape[1] * bits // 32))
    found = unpack(words, bits, codes.shape[1])
    assert found.dtype == torch.int8
    assert torch.equal(found, codes)
    assert torch.equal(found, bit_by_bit(words, bits, codes.shape[1]))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [32, 33, 70])
def test_the_layout_is_that_of_compressed_tensors(bits, columns):
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (3, columns), dtype=torch.int8)
    words = pack_to_int32(codes, bits)
    assert torch.equal(words, pack(codes, bits))
    assert torch.equal(unpack(words, bits, columns), unpack_from_int32(words, bits, codes.shape))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_single_column_of_any_stride(bits):
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (7, 9), dtype=torch.int8)
    words = pack(codes.T, bits).T  # as zero points are stored
    assert torch.equal(unpack(words.T, bits, 7).T, codes)
