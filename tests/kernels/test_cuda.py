"""Integers on a GPU, as far as a machine without one can tell: humming's bit stream, and what is chosen when."""

import copy
import ctypes
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from spectrim.kernels import cuda
from spectrim.kernels.bits import pack, unpack
from spectrim.maths.rounding import Grid, quantize
from spectrim.storage.packed import PackedLinear
from spectrim.storage.runtime import set_runtime

GRIDS = [Grid(bits, group, even) for bits in cuda.BITS for group in cuda.GROUPS for even in (True, False)]
OUT, SIZE = 64, 256


def layer(grid: Grid, out: int = OUT, size: int = SIZE, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
    W = torch.randn(out, size, generator=torch.Generator().manual_seed(grid.bits))
    found = PackedLinear(size, out, grid, dtype=dtype)
    found.load(quantize(W, grid, dtype=dtype))
    nn.init.normal_(found.bias)
    return found.requires_grad_(False)


# humming itself


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_humming_takes_our_tensors_as_they_are(grid):
    """Its reader of compressed-tensors changes no byte of words, scales and zero points, and expects their shapes."""
    pytest.importorskip("humming", reason="humming-kernels is not installed (the extra cuda)", exc_type=ImportError)
    one = layer(grid)
    schema = cuda.humming_schema((grid.bits, grid.group), grid.symmetric)
    tensors = {key: t for key, t in one.state_dict().items() if key not in ("bias", "weight_shape")}
    assert set(schema.get_tensors_attrs(OUT, SIZE, torch.bfloat16)) == {*tensors, "weight_shape"}
    found, taken = schema._convert_humming(tensors, [OUT], [SIZE], torch.bfloat16)
    found.validate_tensors(taken, OUT, SIZE, torch.bfloat16)
    assert torch.equal(taken["weight"], one.weight_packed)
    assert torch.equal(taken["weight_scale"], one.weight_scale)
    assert found.has_zero_point == (not grid.symmetric)
    if one.weight_zero_point is not None:
        assert torch.equal(taken["zero_point"], one.weight_zero_point)


def test_hummings_own_packing_makes_the_same_bytes(tmp_path):
    """Its CUDA source of packing and unpacking, compiled for the CPU with what a kernel needs of CUDA left out."""
    humming = pytest.importorskip("humming", reason="humming-kernels is not installed", exc_type=ImportError)
    shims = tmp_path / "humming" / "utils"
    shims.mkdir(parents=True)
    (shims / "all.cuh").write_text(
        "#include <cstdint>\n#include <cstddef>\n#define CUDA_INLINE inline\n#define PRAGMA_UNROLL\n"
        "#define PRAGMA_UNROLL_COUNT(n)\n#define __global__\n#define MIN(a, b) ((a) < (b) ? (a) : (b))\n"
        "static struct { uint32_t x; } blockIdx, threadIdx;\n"
    )
    calls = "\n".join(
        f'extern "C" void {way}{bits}(uint32_t* in, uint32_t* out, int64_t n) {{'
        f" for (int64_t i = 0; i < n; i++) common_{way}_weight<{bits}>(in + i * {size}, out + i * {other}); }}"
        for bits in range(2, 9)
        for way, size, other in (("pack", 32, bits), ("unpack", bits, 32))
    )
    (tmp_path / "calls.cpp").write_text(f"#include <humming/kernel/pack_weight.cuh>\n{calls}\n")
    include = Path(humming.__file__).parent / "include"
    command = ["g++", "-shared", "-fPIC", "-O1", f"-I{tmp_path}", f"-I{include}", "calls.cpp", "-o", "calls.so"]
    try:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no g++ to compile humming's packing with")
    library = ctypes.CDLL(str(tmp_path / "calls.so"))

    def call(name: str, source: torch.Tensor, target: torch.Tensor) -> None:
        getattr(library, name)(
            ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(target.data_ptr()), ctypes.c_int64(18)
        )

    for bits in range(2, 9):
        codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (6, 96), generator=torch.Generator().manual_seed(bits))
        raw, words = (codes + (1 << bits - 1)).int(), torch.empty(6, 3 * bits, dtype=torch.int32)
        call(f"pack{bits}", raw, words)
        assert torch.equal(words, pack(codes.to(torch.int8), bits))
        back = torch.empty_like(raw)
        call(f"unpack{bits}", words, back)
        assert torch.equal(back - (1 << bits - 1), unpack(words, bits, 96).int())


# What is chosen, with a stand-in for humming (humming_stand_in.py)


@pytest.mark.parametrize("runtime", ["auto", "speed", "memory"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packed_weights_run_through_humming(gpu, grid, runtime):
    one = layer(grid)
    reference, before = copy.deepcopy(one), one.state_dict()
    assert one.run_as(runtime) == "humming"
    for rows in (1, 70):
        x = torch.randn(rows, 3, SIZE).bfloat16()
        torch.testing.assert_close(one(x), reference(x), rtol=0.02, atol=0.2)
    assert torch.equal(one.codes(), reference.codes())
    after = one.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert one.weight_packed.numel() == 0
    assert one.run_as("reference") == "packed"
    assert torch.equal(one.weight_packed, reference.weight_packed)
    assert not [name for name, _ in one.named_buffers() if name.startswith("layout")]


def test_humming_runs_in_float16_and_not_in_float32(gpu):
    assert layer(Grid(4, 32), dtype=torch.float16).run_as("auto") == "humming"
    assert layer(Grid(4, 32), dtype=torch.float32).run_as("auto") == "packed"
    one = layer(Grid(4, 32), dtype=torch.float16)
    one.run_as("auto")
    assert one.float().layout == "packed"  # another dtype, where there is no kernel


def test_inputs_that_want_gradients_and_no_inputs_are_unpacked(gpu):
    one = layer(Grid(4, 32))
    one.run_as("auto")
    gpu.setattr(cuda, "product", lambda *_: pytest.fail("the kernel has no gradient"))
    x = torch.randn(2, SIZE, dtype=torch.bfloat16, requires_grad=True)
    one(x).sum().backward()
    assert x.grad is not None
    assert one(x.detach()[:0]).shape == (0, OUT)


@pytest.mark.parametrize(
    ("grid", "out", "size", "reason"),
    [
        (Grid(5, 32), 64, 64, "5 bits"),
        (Grid(4, 16), 64, 64, "groups of 16"),
        (Grid(4, None), 40, 64, "40 × 64"),
        (Grid(4, None), 64, 40, "64 × 40"),
    ],
)
def test_a_weight_that_does_not_fit_is_unpacked_and_that_is_said_once(gpu, caplog, grid, out, size, reason):
    with caplog.at_level(logging.WARNING, "spectrim"):
        layouts = set_runtime(nn.Sequential(layer(grid, out, size), layer(grid, out + 8, size)), "auto")
    assert layouts == {"packed": 2}
    (line,) = [record.getMessage() for record in caplog.records]
    assert reason in line
    assert "unpacked in every pass" in line


def test_without_humming_weights_are_unpacked_and_that_is_said_once(gpu, caplog):
    gpu.setitem(sys.modules, "humming.transform", None)  # as if it were not installed
    one, other = layer(Grid(4, 32)), layer(Grid(2, 32))
    with caplog.at_level(logging.WARNING, "spectrim"):
        assert [one.run_as("auto"), other.run_as("auto")] == ["packed", "packed"]
    assert len(caplog.records) == 1
    assert one(torch.randn(1, SIZE).bfloat16()).isfinite().all()


def test_a_product_that_is_not_that_of_the_weight_is_refused(gpu, caplog):
    product = sys.modules["humming.forward"].humming_forward
    gpu.setattr(sys.modules["humming.forward"], "humming_forward", lambda *a, **k: product(*a, **k) * 1.1)
    with caplog.at_level(logging.WARNING, "spectrim"):
        assert layer(Grid(4, 32)).run_as("auto") == "packed"
    assert "its product is off by" in caplog.text


def test_unpacking_on_a_gpu_is_that_of_the_kernel_where_there_is_one(gpu):
    one = layer(Grid(3, 32, symmetric=False))
    seen = []
    gpu.setattr(cuda, "unpacked", lambda *parts: seen.append(parts) or torch.zeros(OUT, SIZE))
    assert torch.equal(one.unpacked(), torch.zeros(OUT, SIZE))
    (words, scale, zeros, bits, size), *_ = seen
    assert torch.equal(words, one.weight_packed)
    assert torch.equal(scale, one.weight_scale)
    assert torch.equal(zeros, one.zeros())
    assert (bits, size) == (3, SIZE)


def test_without_triton_unpacking_falls_back_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "spectrim.kernels.unpack_triton", None)
    cuda._SAID.clear()
    one = layer(Grid(4, 32))
    with caplog.at_level(logging.WARNING, "spectrim"):
        assert cuda.unpacked(one.weight_packed, one.weight_scale, None, 4, SIZE) is None
    assert "no triton" in caplog.text
