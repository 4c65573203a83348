"""Products of integers on the CPU against float64 products of what the integers stand for."""

import copy

import pytest
import torch
from torch import nn

from spectrim.bench.engines import held_bytes
from spectrim.errors import ModelError
from spectrim.kernels import cpu
from spectrim.maths.rounding import Grid, quantize
from spectrim.storage import packed
from spectrim.storage.packed import PackedLinear
from spectrim.storage.runtime import RUNTIMES, set_runtime

KNOWN = cpu._block() is not None
GRIDS = [Grid(bits, group, even) for bits in (2, 3, 4, 8) for group in (None, 32, 128) for even in (True, False)]


def test_the_layouts_of_usual_cpus_are_known():
    assert KNOWN or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")


def layer(grid: Grid, out: int = 33, size: int = 256, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
    W = torch.randn(out, size, generator=torch.Generator().manual_seed(out + size))
    found = PackedLinear(size, out, grid, dtype=dtype)
    found.load(quantize(W, grid, dtype=dtype))
    nn.init.normal_(found.bias)
    return found.requires_grad_(False)


def exact(reference: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    wide = copy.deepcopy(reference).double()
    return nn.functional.linear(x.double(), wide.unpacked(), wide.bias)


def error(y: torch.Tensor, truth: torch.Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("rows", [1, 8, cpu.INT4_ROWS, cpu.INT4_ROWS + 1])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_runtime_is_as_near_the_truth_as_the_reference(grid, rows):
    one = layer(grid)
    reference = copy.deepcopy(one)
    x = torch.randn(1, rows, 256).bfloat16()
    truth = exact(reference, x)
    for runtime in RUNTIMES:
        name = one.run_as(runtime)
        assert (name == "packed") == (runtime == "reference" or not (grid.bits == 8 or KNOWN))
        assert (name == "planes") == (runtime == "memory" and grid.bits < 4 and KNOWN)
        y = one(x)
        assert y.dtype == torch.bfloat16
        assert y.shape == (1, rows, 33)
        assert error(y, truth) < max(2.5 * error(reference(x), truth), 4e-3)
        assert (name == "packed") == (one.most_rows == 0)
        if rows > one.most_rows:
            assert torch.equal(y, reference(x))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("runtime", ["speed", "memory"])
def test_the_layout_is_no_part_of_what_is_stored(grid, runtime):
    one = layer(grid)
    before, weight = {key: t.clone() for key, t in one.state_dict().items()}, one.unpacked()
    one.run_as(runtime)
    assert torch.equal(one.unpacked(), weight)
    assert torch.equal(one.to_dense().weight, weight)
    assert one.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.state_dict().items())
    other = PackedLinear(256, 33, grid, dtype=torch.bfloat16)
    other.run_as(runtime)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.unpacked(), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_memory_is_that_of_the_layout_alone(bits):
    one = layer(Grid(bits, 128), out=256, size=1024)
    before = held_bytes(one)
    assert one.run_as("memory") == ("planes" if bits < 4 else f"int{bits}") if KNOWN or bits == 8 else "packed"
    assert held_bytes(one) <= (1.01 if bits < 4 else 1.07) * before  # an offset for each scale
    one.run_as("reference")
    assert held_bytes(one) == before


def test_another_dtype_unpacks_and_bfloat16_has_its_kernel_again():
    one = layer(Grid(8, None))
    assert one.run_as("auto") == "int8"
    weight = one.unpacked()
    one.float()
    assert one.layout == "packed"
    assert torch.equal(one.unpacked().bfloat16(), weight)
    one.bfloat16()
    assert one.layout == "int8"
    assert torch.equal(one.unpacked(), weight)


def test_gradients_flow_to_the_inputs():
    one = layer(Grid(8, None))
    x = torch.randn(2, 256).bfloat16().requires_grad_()
    one.run_as("speed")
    one(x).sum().backward()
    torch.testing.assert_close(x.grad, one.unpacked().sum(0).expand(2, -1), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compiled_and_exported(bits, group):
    one = layer(Grid(bits, group, symmetric=False), out=64, size=64)
    one.run_as("memory")
    x = torch.randn(1, 64).bfloat16()
    program = torch.export.export(one, (x,))
    torch.testing.assert_close(program.module()(x), one(x))
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), one(x))


@pytest.mark.parametrize("runtime", ["speed", "memory", "reference"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_large_weights_run_in_parts(bits, runtime, monkeypatch):
    one = layer(Grid(bits, 64, symmetric=False), out=161)
    x = torch.randn(3, 256).bfloat16()
    many = torch.randn(cpu.INT4_ROWS + 1, 256).bfloat16()
    truth, whole = exact(one, x), one(many)
    small = 2 * 64 * 256  # two blocks of outputs in a part, of three
    monkeypatch.setattr(cpu, "PART", small)
    monkeypatch.setattr(packed, "PART", small)
    reference = copy.deepcopy(one)
    one.run_as(runtime)
    assert one.layout != "planes" or len(one.layout_codes) == 2
    assert torch.equal(one.codes(), reference.codes())
    assert error(one(x), truth) < max(2.5 * error(reference(x), truth), 4e-3)
    torch.testing.assert_close(one(many), whole, rtol=2**-7, atol=1e-2)
    monkeypatch.setattr(one, "unpacked", lambda: pytest.fail("unpacked as a whole"))
    assert one(many).shape == (len(many), 161)


@pytest.mark.parametrize("bits", [4, 8] if KNOWN else [8])
def test_rows_of_a_layout_are_those_of_its_codes(bits):
    one = layer(Grid(bits, 32, symmetric=False), out=200)
    one.run_as("speed")
    rows = torch.tensor([0, 199, 3, 64, 31, 32, 3, 127, 16])
    found = cpu.int8_codes(one.layout_codes[:, rows]) if bits == 8 else cpu.int4_codes_of(one.layout_codes, rows, 256)
    assert torch.equal(found, one.codes()[rows])


def test_sizes_that_no_kernel_takes_are_unpacked():
    one = layer(Grid(4, None), out=8, size=40)
    assert one.run_as("speed") == "packed"
    assert cpu.int4_group(40, None) is None
    assert cpu.int4_group(96, 32) == (32 if KNOWN else None)
    assert cpu.int4_group(512, None) == (256 if KNOWN else None)


@pytest.mark.parametrize("size", [8, 24, 40])
def test_the_8_bit_product_is_not_asked_for_widths_beyond_which_it_would_read(size):
    assert layer(Grid(8, None), out=16, size=size).run_as("speed") == "packed"
    assert layer(Grid(8, None), out=3, size=16).run_as("speed") == "int8"


def test_an_unknown_runtime_is_named():
    with pytest.raises(ModelError, match=r"no runtime 'fast'.*auto, speed, memory, reference"):
        set_runtime(nn.Sequential(layer(Grid(4, 32))), "fast")
