"""Integers that stay packed in vLLM: on a CPU as they run, on GPUs as far as kernels ask and layouts go. Needs vLLM."""

import logging
import warnings
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm")
    from vllm.config import get_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.kernels import linear as kernels
    from vllm.model_executor.kernels.linear import MPLinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision import (
        conch,
        cutlass,
        exllama,
        humming,
        machete,
        marlin,
        triton_w4a16,
    )
    from vllm.model_executor.layers import linear as vllm_linear
    from vllm.model_executor.layers.quantization.utils import machete_utils, marlin_utils
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter, permute_param_layout_
    from vllm.platforms.interface import DeviceCapability, PlatformEnum

    from helpers.vllm_layers import config, fill, part, rounded, row_parallel

from spectrim.bench.engines import _laid_out, held_bytes
from spectrim.maths.rounding import Grid
from spectrim.serve import linears, matrices
from spectrim.serve.matrices import Matrix, OwnMatrix, PackedMatrix, kernel_here
from spectrim.storage.packed import PackedLinear

pytestmark = pytest.mark.filterwarnings("ignore")
HEADS, SIZE, INPUTS = 4, 64, 256
CASES = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def mixed_parts(
    bits: int, symmetric: bool, dtype: torch.dtype, group: int | None = 32, *, rotated: bool = False
) -> dict[str, Any]:
    """q in integers, k in integer factors, v in integers beside factors of integers; q may rotate its inputs."""
    torch.manual_seed(0)
    q, k, v = (part(HEADS * SIZE, rank, False, INPUTS).to(dtype) for rank in (None, 96, 32))
    grid = bits, symmetric, group
    made = rounded(q, [""], *grid, rotated=rotated), rounded(k, ["A", "B"], *grid), rounded(v, ["A", "B", "R"], *grid)
    return {f"x.{name}_proj": layer for name, layer in zip("qkv", made, strict=True)}


def merged(parts: dict[str, Any], dtype: torch.dtype, runtime: str = "auto") -> Any:
    layer = vllm_linear.QKVParallelLinear(
        INPUTS, SIZE, HEADS, bias=True, params_dtype=dtype, quant_config=config(parts, runtime), prefix="x.qkv_proj"
    )
    for name, shard in zip(parts, "qkv", strict=True):
        fill(layer, parts[name], shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def held(tensors: Any) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def sources(parts: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """What the layers of transformers make of it, unpacked, in float32."""
    return torch.cat([deepcopy(layer).float()(x.float()) for layer in parts.values()], dim=-1)


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_memory_is_that_of_the_file(bits, symmetric, dtype, process):
    process(0, 1)
    parts = mixed_parts(bits, symmetric, dtype)
    layer = merged(parts, dtype)
    stored = held(chain.from_iterable(each.state_dict().values() for each in parts.values()))
    assert held(chain(layer.parameters(), layer.buffers())) <= 1.1 * stored
    kinds = {type(matrix) for matrix in (*layer.first, *layer.second)}
    assert kinds == {PackedMatrix if bits == 4 and dtype != torch.float32 and kernel_here() else OwnMatrix}


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("runtime", ["auto", "speed"])
@pytest.mark.parametrize("rotated", [False, True])
def test_packed_paths_give_what_the_reference_gives(bits, symmetric, group, dtype, runtime, rotated, process):
    process(0, 1)
    parts = mixed_parts(bits, symmetric, dtype, group, rotated=rotated)
    layers = [merged(parts, dtype, how) for how in (runtime, "reference")]
    assert all(isinstance(matrix, Matrix) for matrix in (*layers[1].first, *layers[1].second))
    for rows in (1, 9):  # few rows go through kernels
        x = torch.randn(rows, INPUTS, dtype=dtype)
        fast, slow = (layer(x)[0].float() for layer in layers)
        exact = sources(parts, x)
        error, allowed = (y.sub(exact).norm() / exact.norm() for y in (fast, slow))
        assert error <= 2 * allowed + {torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("dtype", "runtime", "wanted"),
    [
        (torch.bfloat16, "speed", OwnMatrix),
        (torch.float16, "speed", PackedMatrix),
        (torch.float32, "speed", Matrix),
        (torch.bfloat16, "memory", PackedMatrix),
        (torch.float32, "memory", OwnMatrix),
        (torch.bfloat16, "reference", Matrix),
    ],
)
@pytest.mark.skipif(not kernel_here(), reason="vLLM's kernel for integers needs AVX-512 and no AMX")
def test_the_runtime_of_the_checkpoint_chooses(dtype, runtime, wanted, process):
    process(0, 1)
    layer = merged(mixed_parts(4, True, dtype), dtype, runtime)
    assert {type(matrix) for matrix in (*layer.first, *layer.second)} == {wanted}


def test_what_is_unpacked_is_said_once(process, caplog):
    process(0, 1)
    parts = mixed_parts(4, True, torch.float32)
    with caplog.at_level(logging.WARNING, logger="spectrim"):
        merged(parts, torch.float32)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="spectrim"):
        layer = merged(parts, torch.float32, "reference")
        layer.quant_method.served.report()
    (record,) = caplog.records
    packs = [each for source in parts.values() for each in source.modules() if isinstance(each, PackedLinear)]
    cost = sum(
        4 * each.in_features * each.out_features - each.grid.nbytes(*each.weight_shape.tolist(), 4) for each in packs
    )
    assert f"integers of 3 linears are unpacked, which takes {cost / 1e6:.1f} MB more" in record.message
    assert "x.k_proj, x.q_proj, x.v_proj" in record.message


class DocumentedKernel(MPLinearKernel):
    """Computes by the layout that Machete and Marlin say they take, bit by bit."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        words, scale, zero = self._get_weight_params(layer)
        size, out = self.config.partition_weight_shape
        bits, groups = self.config.weight_type.size_bits, scale.shape[1]
        assert type(words) is PackedvLLMParameter
        assert type(scale) is GroupQuantScaleParameter
        assert words.packed_factor * bits == 32
        assert words.shape == (out, -(-size * bits // 32))
        assert scale.shape == (out, 1 if self.config.group_size == -1 else size // self.config.group_size)
        permute_param_layout_(words, input_dim=0, output_dim=1, packed_dim=0)
        permute_param_layout_(scale, input_dim=0, output_dim=1)
        codes = self.numbers(words.T, bits, size).T  # [in, out]
        if self.config.zero_points:
            assert type(zero) is PackedvLLMParameter
            assert zero.shape == (out * bits // 32, groups)
            permute_param_layout_(zero, input_dim=0, output_dim=1, packed_dim=1)
            offset = self.numbers(zero, bits, out)  # [groups, out]
        else:
            assert zero is None
            offset = torch.tensor([[self.config.weight_type.bias]])
        steps = codes.unflatten(0, (groups, -1)) - offset[:, None]
        self.weight = (steps * scale[:, None]).flatten(0, 1)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x @ self.weight.to(x.dtype)

    @staticmethod
    def numbers(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
        """Unsigned numbers [rows, count] of rows of words, the lowest bits first, across words."""
        each = (words[..., None].long() >> torch.arange(32) & 1).flatten(1)  # all bits of a row
        each = each[:, : count * bits].unflatten(1, (count, bits))
        return (each << torch.arange(bits)).sum(2)


@pytest.fixture
def elsewhere(monkeypatch) -> Callable[[int], None]:
    """``elsewhere(90)``: vLLM chooses kernels as for a GPU of this compute capability."""

    def become(capability: int) -> None:
        gpu = SimpleNamespace(
            _enum=PlatformEnum.CUDA, is_cuda=lambda: True, is_cuda_alike=lambda: True, is_cpu=lambda: False,
            is_rocm=lambda: False, is_xpu=lambda: False, is_device_capability=lambda c: c == capability,
            get_device_capability=lambda *_: DeviceCapability(*divmod(capability, 10)),
            has_device_capability=lambda c: c <= capability,
            is_device_capability_family=lambda c: c // 10 == capability // 10,
        )  # fmt: skip
        users = (conch, cutlass, exllama, humming, machete, marlin, triton_w4a16, machete_utils, marlin_utils)
        for module in (kernels, matrices, *users):
            if hasattr(module, "current_platform"):
                monkeypatch.setattr(module, "current_platform", gpu)

    return become


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("parallel", [1, 2])
def test_the_layout_that_kernels_on_gpus_read(bits, symmetric, group, parallel, process, elsewhere, monkeypatch):
    """Dense integers, factors, and integers beside factors; with two processes, each of its own outputs."""
    elsewhere(90)
    asked = []
    monkeypatch.setattr(matrices, "choose_mp_linear_kernel", lambda config: asked.append(config) or DocumentedKernel)
    parts = mixed_parts(bits, symmetric, torch.float16, group)
    x = torch.randn(3, INPUTS, dtype=torch.float16)
    exact = torch.stack(sources(parts, x).chunk(3, dim=1))
    for rank in range(parallel):
        process(rank, parallel)
        layer = merged(parts, torch.float16)
        assert all(isinstance(matrix, PackedMatrix) for matrix in (*layer.first, *layer.second))
        got = torch.stack(layer(x)[0].float().chunk(3, dim=1))
        mine = exact.chunk(parallel, dim=2)[rank]
        assert (got - mine).norm() < 2e-3 * mine.norm()
    first = asked[0]
    rows = 2 * HEADS * SIZE // parallel + 96 + 32  # of q and R, and the latents
    assert first.partition_weight_shape == (INPUTS, rows)
    assert (first.act_type, first.group_size, first.zero_points) == (torch.float16, group or -1, not symmetric)
    assert (first.weight_type.size_bits, first.weight_type.has_bias()) == (bits, symmetric)


def test_words_for_gpus_are_those_of_the_file(process, elsewhere, monkeypatch):
    elsewhere(90)
    process(0, 1)
    monkeypatch.setattr(matrices, "choose_mp_linear_kernel", lambda _: DocumentedKernel)
    monkeypatch.setattr(DocumentedKernel, "process_weights_after_loading", lambda *_: None)
    for bits, symmetric in CASES:
        source = rounded(part(96, None, False, 64), [""], bits, symmetric, 32)
        matrix = row_parallel(source, config({"x.down": source}), params_dtype=torch.float16).first[0]
        for name in ("weight_packed", "weight_zero_point") if not symmetric else ("weight_packed",):
            assert torch.equal(getattr(matrix, name).data, getattr(source, name))
            assert getattr(matrix, name).is_contiguous()


# By bits, whether symmetric, and group; with the package humming and without, where it makes a difference.
CHOICES = {
    (4, True, 128): ("MarlinLinearKernel", "MacheteLinearKernel"),
    (4, False, 128): ("MarlinLinearKernel", "MacheteLinearKernel"),
    (4, True, None): ("MarlinLinearKernel", "MacheteLinearKernel"),
    (8, True, 128): ("MarlinLinearKernel", "MacheteLinearKernel"),
    (8, False, 128): (None, "MacheteLinearKernel"),
    (3, True, 128): (None, None),
    (2, False, 32): (None, None),
}


@pytest.mark.parametrize("installed", [False, True])
def test_the_choice_is_that_of_vllm(installed, elsewhere, monkeypatch):
    monkeypatch.setattr(humming, "has_humming", lambda: installed)
    for (bits, symmetric, group), names in CHOICES.items():
        for capability, name in zip((80, 90), names, strict=True):
            elsewhere(capability)
            found = matrices.kernel_for(512, range(1024), Grid(bits, group, symmetric), torch.bfloat16)
            name = name or ("HummingLinearKernel" if installed else None)
            assert (found and found.__name__) == name, (capability, bits, symmetric, group)
    assert matrices.kernel_for(512, range(1024), Grid(4, 128), torch.float32) is None
    assert matrices.kernel_for(512, range(4, 1024), Grid(4, None), torch.float16) is None  # begins inside a word
    assert matrices.kernel_for(510, range(1024), Grid(4, 128, symmetric=False), torch.float16) is None


def test_without_a_kernel_a_gpu_unpacks(process, elsewhere, caplog):
    elsewhere(80)
    process(0, 1)
    parts = mixed_parts(3, True, torch.float16)
    with caplog.at_level(logging.WARNING, logger="spectrim"):
        layer = merged(parts, torch.float16)
    assert all(isinstance(matrix, Matrix) for matrix in (*layer.first, *layer.second))
    assert "integers of 3 linears are unpacked" in caplog.text


@pytest.mark.parametrize("form", ["whole", "pivoted", "heads", "integers", "dense", "rest"])
def test_processes_add_up_latents_where_these_are_fewer(form, process, monkeypatch):
    """Of a linear whose inputs are shared, each process gives the whole output, bias included."""
    torch.manual_seed(0)
    rank: Any = {"heads": (3, 1, 4, 2), "dense": None}.get(form, 32)
    source: Any = part(64, rank, form == "pivoted", 64)
    parts = {"integers": ["A", "B"], "dense": [""], "rest": ["R"]}.get(form, [])
    source = rounded(source, parts, 8, False, 32) if parts else source
    x, latents = torch.randn(3, 64), form not in ("dense", "rest")
    sums: dict[int, list[torch.Tensor]] = {}

    def run(reduce: Callable[[torch.Tensor, int], torch.Tensor]) -> list[torch.Tensor]:
        outputs = []
        for index in range(2):
            process(index, 2)
            monkeypatch.setattr(linears, "tensor_model_parallel_all_reduce", lambda y, i=index: reduce(y, i))
            monkeypatch.setattr(vllm_linear, "tensor_model_parallel_all_reduce", lambda y, i=index: reduce(y, i))
            layer = row_parallel(source, config({"x.down": source}))
            layer.bias.data.copy_(source.bias.detach())
            assert layer.reduce_results != latents
            outputs.append(layer(x.chunk(2, dim=1)[index])[0])
        return outputs

    def first_pass(y: torch.Tensor, index: int) -> torch.Tensor:
        sums.setdefault(index, []).append(y)
        return y

    run(first_pass)
    (total,) = (sum(each) for each in zip(*sums.values(), strict=True))
    assert total.shape[1] == (source.B.out_features if latents else 64)
    for output in run(lambda *_: total):
        torch.testing.assert_close(output, source(x), atol=1e-4, rtol=1e-4)


def test_columns_that_begin_inside_a_word(process):
    """A process has 40 of 80 inputs in 3 bits: 120 bits of each row."""
    torch.manual_seed(0)
    source: Any = rounded(part(33, None, False, 80), [""], 3, False, None)
    x, total = torch.randn(3, 80), source.bias.detach().clone()
    for index in range(2):
        process(index, 2)
        layer = row_parallel(source, config({"x.down": source}), reduce_results=False, skip_bias_add=True)
        assert isinstance(layer.first[0], OwnMatrix)
        total = total + layer(x.chunk(2, dim=1)[index])[0]
    torch.testing.assert_close(total, source(x), atol=1e-4, rtol=1e-4)


def test_outputs_are_added_up_where_vllm_or_an_adapter_asks_for_them(process, monkeypatch):
    source = part(64, 5, False, 64)
    process(0, 2)
    layer = row_parallel(source, config({"x.down": source}), reduce_results=False, skip_bias_add=True)
    assert not layer.quant_method.reduces
    monkeypatch.setattr(get_current_vllm_config(), "lora_config", object())
    layer = row_parallel(source, config({"x.down": source}))
    assert layer.reduce_results
    assert not layer.quant_method.reduces


@pytest.mark.parametrize("bits", [3, 8])
def test_compiled_for_any_number_of_rows(bits, process):
    """Which way few rows go is left to the layer, not to the compiler."""
    process(0, 1)
    torch.manual_seed(0)
    source = rounded(part(96, 32, False, 64).to(torch.bfloat16), ["A", "B"], bits, False, 32)
    layer = row_parallel(source, config({"x.down": source}), params_dtype=torch.bfloat16)
    graphs = CompileCounter()
    compiled = torch.compile(lambda x: layer(x)[0], backend=graphs, fullgraph=True, dynamic=True)
    with set_forward_context(None, get_current_vllm_config()):
        for rows in (70, 2):
            x = torch.randn(rows, 64, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), layer(x)[0])
    assert graphs.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bench_counts_what_kernels_for_cpus_have_taken_out_of_a_module(dtype, process):
    process(0, 1)
    source = part(96, 32, False, 64).to(dtype)
    layer = row_parallel(source, config({"x.down": source}), params_dtype=dtype)
    found = held_bytes(layer) + sum(map(_laid_out, layer.modules()))
    assert found == sum(tensor.nbytes for tensor in source.state_dict().values())
