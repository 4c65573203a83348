"""vLLM's own linears, in one and several processes, against the layers of transformers. Needs vLLM."""

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm")
    from vllm.model_executor.layers import linear as vllm_linear

    import helpers.toy_form  # noqa: F401
    from helpers.vllm_layers import config, fill, part, rounded

from spectrim.checkpoint import SpectrimConfig
from spectrim.errors import CheckpointError
from spectrim.maths.decompose import Rank
from spectrim.maths.rounding import Grid, quantize
from spectrim.serve.matrices import Matrix, PackedMatrix, kernel_here
from spectrim.serve.plugin import FactoredConfig
from spectrim.storage import form

pytestmark = pytest.mark.filterwarnings("ignore")
HEADS, SHARED, SIZE, IN = 4, 2, 8, 20
# q, k and v of a merged linear: rank (None is dense) and whether it is pivoted
MERGED: dict[str, list[tuple[Rank | None, bool]]] = {
    "whole": [(9, False), (6, False), (5, False)],
    "mixed": [((3, 1, 4, 2), False), (None, False), (6, True)],
    "heads": [((3, 1, 4, 2), False), ((5, 2), False), ((1, 6), False)],
    "pivoted": [(9, True), (6, True), (5, True)],
}
# the same with those parts that are integers; the inputs are 64
INTEGERS: dict[str, list[tuple[Rank | None, bool, list[str]]]] = {
    "dense": [(None, False, [""]), (None, False, [""]), (None, False, [])],
    "factors": [(32, False, ["A", "B"]), (6, False, ["A"]), (5, False, ["B"])],
    "rest": [(32, False, ["R", "A", "B"]), (6, False, ["R"]), (5, False, ["R", "B"])],
    "mixed": [((3, 1, 4, 2), False, ["A.1", "A.2", "B"]), (None, False, [""]), (6, True, [])],
}
GRIDS = [(3, False), (4, True), (8, False), (2, True), (4, False), (8, True)]  # bits, and whether symmetric


def check_merged(parts: dict[str, Any], x: torch.Tensor, parallel: int, process: Any, size: int, **close: float) -> Any:
    """Each process must give its query heads and its key/value heads, of which four processes share two."""
    wanted = [deepcopy(layer).float()(x.float()) for layer in parts.values()]
    for rank in range(parallel):
        process(rank, parallel)
        layer = vllm_linear.QKVParallelLinear(
            x.shape[1], size, HEADS, SHARED, bias=True, params_dtype=x.dtype, quant_config=config(parts),
            prefix="x.qkv_proj",
        )  # fmt: skip
        for name, shard in zip(parts, "qkv", strict=True):
            fill(layer, parts[name], shard)
        layer.quant_method.process_weights_after_loading(layer)
        got = layer(x)[0].split([layer.num_heads * size] + [layer.num_kv_heads * size] * 2, dim=-1)
        for whole, mine, repeats in zip(wanted, got, [1, *[layer.num_kv_head_replicas] * 2], strict=True):
            start = rank // repeats * mine.shape[1]
            assert mine.dtype == x.dtype
            torch.testing.assert_close(mine.float(), whole[:, start : start + mine.shape[1]], **close)
    return layer


@pytest.mark.parametrize("form", MERGED)
@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_merged_linear_in_several_processes(form, parallel, process):
    torch.manual_seed(0)
    outs = [HEADS * SIZE, SHARED * SIZE, SHARED * SIZE]
    parts = {f"x.{n}_proj": part(out, *each, IN) for n, out, each in zip("qkv", outs, MERGED[form], strict=True)}
    check_merged(parts, torch.randn(3, IN), parallel, process, SIZE, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", INTEGERS)
@pytest.mark.parametrize("parallel", [1, 2, 4])
@pytest.mark.parametrize("first", range(len(GRIDS)))
def test_merged_integers_in_several_processes(form, parallel, first, process):
    """Every part on a grid of its own."""
    torch.manual_seed(0)
    parts, outs = {}, [HEADS * SIZE, SHARED * SIZE, SHARED * SIZE]
    for i, (rank, pivoted, integers) in enumerate(INTEGERS[form]):
        layer = part(outs[i], rank, pivoted, 64)
        parts[f"x.{'qkv'[i]}_proj"] = rounded(layer, integers, *GRIDS[(first + i) % len(GRIDS)], rotated=i == 1)
    check_merged(parts, torch.randn(3, 64), parallel, process, SIZE, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not kernel_here(), reason="vLLM's kernel for integers needs AVX-512 and no AMX")
@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_integers_that_stay_integers(dtype, parallel, process):
    """In 16 bits vLLM's kernel computes with integers of 4 bits; those of one grid that read one input are joined."""
    torch.manual_seed(0)
    inputs, size = 64, 32
    q = rounded(part(HEADS * size, None, False, inputs).to(dtype), [""], 4, True, 32)
    k = rounded(part(SHARED * size, 7, False, inputs).to(dtype), ["R"], 4, True, 32)
    v = rounded(part(SHARED * size, 32, False, inputs).to(dtype), ["A", "B"], 4, False)
    x = torch.randn(5, inputs, dtype=dtype)
    close = {"atol": 0.05, "rtol": 0.01} if dtype == torch.float16 else {"atol": 0.4, "rtol": 0.05}
    layer = check_merged({"x.q_proj": q, "x.k_proj": k, "x.v_proj": v}, x, parallel, process, size, **close)
    assert [type(matrix) for matrix in layer.first] == [PackedMatrix, PackedMatrix, Matrix]
    assert [type(matrix) for matrix in layer.second] == [Matrix, PackedMatrix]
    assert layer.first[0].weight_scale.numel() == (HEADS + SHARED) * size // parallel * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("integers", [[""], ["A", "B"], ["R"]])
@pytest.mark.parametrize("rotated", [False, True])
def test_integers_shared_by_inputs(integers, group, symmetric, dtype, rotated, process):
    """Two processes have half of the inputs each, which cuts the groups of 64 in two: these are unpacked."""
    torch.manual_seed(0)
    rank = None if integers == [""] else 32
    down, x = part(64, rank, False, 64).to(dtype), torch.randn(3, 64, dtype=dtype)
    down, total = rounded(down, integers, 4, symmetric, group, rotated=rotated), torch.zeros(3, 64)
    for index in range(2):
        process(index, 2)
        layer = vllm_linear.RowParallelLinear(
            64, 64, bias=True, reduce_results=False, skip_bias_add=True, params_dtype=dtype,
            quant_config=config({"x.down": down}), prefix="x.down",
        )  # fmt: skip
        fill(layer, down)
        layer.quant_method.process_weights_after_loading(layer)
        total += layer(x.chunk(2, dim=1)[index])[0].float()
        stays = dtype == torch.float16 and group == 32 and kernel_here()
        assert any(isinstance(matrix, PackedMatrix) for matrix in layer.first) == stays
    close = {"atol": 0.05, "rtol": 0.01} if dtype == torch.float16 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(total + down.bias.float(), deepcopy(down).float()(x.float()), **close)


@pytest.mark.parametrize(("rank", "pivoted"), [(9, False), ((3, 1, 4, 2), False), (9, True)])
@pytest.mark.parametrize("parallel", [1, 2])
def test_linears_that_share_inputs_or_come_joined(rank, pivoted, parallel, process):
    """Row-parallel outputs of all processes add up; q, k and v in one linear of the checkpoint are taken apart."""
    torch.manual_seed(0)
    down, x = part(32, rank, pivoted, IN), torch.randn(3, IN)
    joined = part(3 * HEADS * SIZE, rank, pivoted, IN)
    total = torch.zeros(3, 32)
    thirds = joined(x).view(3, 3, parallel, -1)
    for index in range(parallel):
        process(index, parallel)
        settings = config({"x.down": down, "x.qkv": joined})
        layer = vllm_linear.RowParallelLinear(
            IN, 32, bias=True, reduce_results=parallel == 1, skip_bias_add=parallel > 1, quant_config=settings,
            prefix="x.down",
        )  # fmt: skip
        fill(layer, down)
        layer.quant_method.process_weights_after_loading(layer)
        total += layer(x.chunk(parallel, dim=1)[index])[0]
        layer = vllm_linear.QKVParallelLinear(IN, SIZE, HEADS, bias=True, quant_config=settings, prefix="x.qkv")
        fill(layer, joined)
        layer.quant_method.process_weights_after_loading(layer)
        mine = thirds[:, :, index].flatten(1)
        torch.testing.assert_close(layer(x)[0], mine, atol=1e-4, rtol=1e-4)
    if parallel > 1:
        total += down.bias
    torch.testing.assert_close(total, down(x), atol=1e-4, rtol=1e-4)


def test_a_tensor_that_is_missing_or_misshapen_is_an_error(process):
    process(0, 1)
    parts = {"x.o_proj": part(16, 5, True, IN)}

    made = vllm_linear.RowParallelLinear(IN, 16, quant_config=config(parts), prefix="x.o_proj")
    with pytest.raises(CheckpointError, match=r"lacks x\.o_proj\.A\.weight, x\.o_proj\.B\.weight, x\.o_proj\.pivots"):
        made.quant_method.process_weights_after_loading(made)
    slot = made.get_parameter("A.weight")
    with pytest.raises(CheckpointError, match=r"x\.o_proj\.A\.weight has the shape \[16, 5\] instead of \[11, 5\]"):
        slot.weight_loader(slot, torch.zeros(16, 5))
    slot = made.get_parameter("weight")
    with pytest.raises(CheckpointError, match=r"x\.o_proj\.weight has the shape"):
        slot.weight_loader(slot, torch.zeros(16, IN))


def test_integers_that_are_missing_or_misshapen_are_an_error(process):
    process(0, 1)
    q = rounded(part(16, 5, False, 64), ["B"], 4, False)

    tensors = {name: tensor for name, tensor in q.state_dict().items() if name != "B.weight_scale"}
    made = vllm_linear.RowParallelLinear(64, 16, quant_config=config({"x.o_proj": q}), prefix="x.o_proj")
    for name, tensor in tensors.items():
        slot = made.get_parameter(name)
        slot.weight_loader(slot, tensor)
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks x\.o_proj\.B\.weight_scale;"):
        made.quant_method.process_weights_after_loading(made)
    slot = made.get_parameter("B.weight_scale")
    with pytest.raises(CheckpointError, match=r"x\.o_proj\.B\.weight_scale has the shape \[5, 2\] instead of \[5, 1\]"):
        slot.weight_loader(slot, torch.zeros(5, 2))
    slot = made.get_parameter("B.weight_shape")
    slot.weight_loader(slot, torch.tensor([5, 32]))
    slot = made.get_parameter("B.weight_scale")
    wrong = r"the checkpoint's x\.o_proj\.B does not fit the linear \(weight_shape: it is \[5, 32\], not \[5, 64\]\)"
    with pytest.raises(CheckpointError, match=wrong):
        slot.weight_loader(slot, torch.ones(5, 1))


def test_a_layer_that_loads_in_its_own_way_is_refused(process):
    class Own(vllm_linear.ReplicatedLinear):
        def weight_loader(self, *args: Any) -> None: ...

    process(0, 1)
    with pytest.raises(CheckpointError, match=r"x\.gate is a Own in vLLM, which spectrim cannot serve"):
        Own(IN, 16, quant_config=config({"x.gate": part(16, 5, False, IN)}), prefix="x.gate")


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("bits", [None, 3])
def test_narrower_linears_and_a_form_that_becomes_dense(bits, parallel, process, caplog):
    """Rows of gate and up, columns of down; and a form of somebody else. Several processes have them dense."""
    torch.manual_seed(0)
    inner, hidden, count = 32, IN, 20
    grid = None if bits is None else Grid(bits, None)
    given = {} if grid is None else {"grid": grid.spec}

    def made(out: int, size: int, kind: str, **spec: Any) -> Any:
        layer = form(kind).build(torch.nn.Linear(size, out), spec)
        with torch.no_grad():
            if kind != "narrow":
                for tensor in (layer.left, layer.right, layer.diagonal):
                    tensor.normal_()
                return layer
            layer.units.copy_(torch.randperm(inner)[:count].sort().values)
            if grid is None:
                layer.N.weight.normal_()
            else:
                layer.N.load(quantize(torch.randn(layer.N.out_features, layer.N.in_features), grid))
        return layer

    gate, up = made(inner, hidden, "narrow", outputs=count, **given), made(inner, hidden, "diagonal+low-rank", rank=3)
    down, x = made(hidden, inner, "narrow", inputs=count, **given), torch.randn(3, hidden)
    settings = config({"x.gate_proj": gate, "x.up_proj": up, "x.down": down})
    settings.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    total, halves = torch.zeros(3, hidden), []
    for index in range(parallel):
        process(index, parallel)
        merged = vllm_linear.MergedColumnParallelLinear(
            hidden,
            [inner, inner],
            bias=True,
            params_dtype=torch.float32,
            quant_config=settings,
            prefix="x.gate_up_proj",
        )
        fill(merged, gate, 0)
        fill(merged, up, 1)
        merged.quant_method.process_weights_after_loading(merged)
        halves.append(merged(x)[0].chunk(2, dim=-1))
        last = vllm_linear.RowParallelLinear(
            inner, hidden, bias=True, reduce_results=parallel == 1, skip_bias_add=parallel > 1,
            params_dtype=torch.float32, quant_config=settings, prefix="x.down",
        )  # fmt: skip
        fill(last, down)
        last.quant_method.process_weights_after_loading(last)
        if parallel == 1:
            assert merged.quant_method.pads
            assert torch.equal(last.read, down.units)
        y = last(halves[-1][0])[0]
        total += y - (down.bias if parallel == 1 else 0)
    for found, layer in zip((torch.cat(part, -1) for part in zip(*halves, strict=True)), (gate, up), strict=True):
        torch.testing.assert_close(found, layer(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(total + down.bias, down(gate(x)), atol=1e-3, rtol=1e-4)
    assert "become dense, which takes" in caplog.text


def test_other_forms_with_impossible_values_are_named(process):
    process(0, 1)
    layer = form("narrow").build(torch.nn.Linear(IN, 16), {"inputs": 5})
    settings = config({"x.k": layer})
    module = vllm_linear.ReplicatedLinear(IN, 16, quant_config=settings, prefix="x.k")
    layer.units.fill_(3)
    with pytest.raises(CheckpointError, match=r"x\.k does not fit the linear .*ascending"):
        fill(module, layer)


def test_a_form_that_nobody_knows_is_named(process):
    process(0, 1)
    settings = FactoredConfig(SpectrimConfig({"x.q": 3}, forms={"x.k": {"form": "columns", "count": 3}}))
    vllm_linear.ReplicatedLinear(IN, 16, quant_config=settings, prefix="x.q")
    with pytest.raises(CheckpointError, match=r"'x\.k': .*'columns'"):
        vllm_linear.ReplicatedLinear(IN, 16, quant_config=settings, prefix="x.k")
