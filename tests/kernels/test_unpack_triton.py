"""The kernel that unpacks integers on a GPU, in Triton's interpreter, against the unpacking of torch."""

import pytest
import torch

from spectrim.maths.rounding import Grid, quantize
from spectrim.storage.packed import PackedLinear

pytest.importorskip("triton", reason="triton is not installed")
from spectrim.kernels.unpack_triton import unpack_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "size"), [(None, 75), (32, 96), (128, 640)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_it_gives_the_weight(bits, group, size, symmetric):
    dtype = (torch.float16, torch.float32, torch.bfloat16)[(bits + size + symmetric) % 3]
    grid = Grid(bits, group, symmetric)
    one = PackedLinear(size, 37, grid, bias=False, dtype=dtype)  # neither side is a multiple of a tile
    one.load(quantize(torch.randn(37, size, generator=torch.Generator().manual_seed(bits)), grid, dtype=dtype))
    one.to(DEVICE)
    found = unpack_weight(one.weight_packed, one.weight_scale, one.zeros(), bits, size)
    truth = one.to("cpu").unpacked()
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts numbers off where a GPU rounds them
        torch.testing.assert_close(found, truth, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found.cpu(), truth)
