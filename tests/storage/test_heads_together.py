"""A of all heads as one product: the same numbers, whoever writes into them, and nothing of it in files."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from spectrim.maths.rounding import Grid, quantize
from spectrim.storage.layers import LowRankLinear
from spectrim.storage.packed import PackedLinear
from spectrim.storage.runtime import set_runtime

RANKS = [(5, 7, 3, 8), (6, 6, 6, 6), (8,)]
GRID = Grid(4, None)


def layer(ranks=RANKS[0], dtype=torch.bfloat16) -> LowRankLinear:
    """A layer of 64 inputs with random factors."""
    torch.manual_seed(0)
    found = LowRankLinear(64, 16 * len(ranks), ranks, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_()
    return found


def packed(ranks=RANKS[0]) -> LowRankLinear:
    """The same with integers in all factors."""
    found = layer(ranks)
    A, B = [head.weight.data.clone() for head in found.A], found.B.weight.data.clone()
    for name, W in {**{f"A.{h}": W for h, W in enumerate(A)}, "B": B}.items():
        found.pack(name, GRID)
        found.get_submodule(name).load(quantize(W.double(), GRID, dtype=torch.bfloat16))
    return found


def products(found: LowRankLinear, rows: int = 1) -> tuple[torch.Tensor, int]:
    """Outputs, and how many heads ran by themselves."""
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad(), torch.profiler.profile() as seen:
        y = found(x)
    calls = {event.key: event.count for event in seen.key_averages()}
    return y, calls.get("aten::linear", 0) - isinstance(found.B, nn.Linear)


@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("make", [layer, packed])
def test_one_product_is_that_of_every_head(make, ranks, rows):
    found = make(ranks)
    expected, apart = products(found, rows)
    assert found.run_as("speed") == "heads together"
    y, left = products(found, rows)
    assert left < apart
    assert left == 0 or make is packed  # B of a packed layer may be unpacked for a linear
    torch.testing.assert_close(y.float(), expected.float(), rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("make", [layer, packed])
def test_the_state_dict_is_that_of_the_reference_and_loads(make):
    found, expected = make(), make().state_dict()
    found.run_as("speed")
    state = found.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert all(tensor.is_contiguous() for tensor in state.values())
    other = {name: x * 2 if x.is_floating_point() else x for name, x in expected.items()}
    found.load_state_dict(other)
    assert all(torch.equal(x, other[name]) for name, x in found.state_dict().items())
    fresh = make()
    fresh.load_state_dict(other)
    assert torch.equal(products(found)[0], products(fresh)[0])


def test_writing_into_a_head_is_seen():
    """Also through `.data`, which bumps no version: PEFT merges adapters that way."""
    found, plain = layer(), layer()
    found.run_as("speed")
    for one in (found, plain):
        one.A[2].weight.data += 1
        with torch.no_grad():
            one.A[1].weight.mul_(2)
    y, left = products(found)
    assert left == 0
    assert torch.equal(y, products(plain)[0])
    assert torch.equal(found.product(), plain.product())


def test_another_weight_or_module_hook_or_gradient_runs_every_head():
    found = layer()
    found.run_as("speed")
    handle = found.A[1].register_forward_hook(lambda *_: torch.zeros(1, 16, dtype=torch.bfloat16))
    y, left = products(found)
    assert left == 4
    assert torch.equal(y[:, 16:32] - found.bias[16:32], torch.zeros(1, 16))
    handle.remove()
    found.A[1].weight.data = torch.zeros_like(found.A[1].weight)
    y, left = products(found)
    assert left == 4
    assert torch.equal(y[:, 16:32] - found.bias[16:32], torch.zeros(1, 16))
    trained = layer()
    trained.run_as("speed")
    trained(torch.randn(1, 64).bfloat16()).sum().backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in trained.A)


def test_adapters_of_heads_run_and_merge():
    model = nn.Sequential(layer())
    set_runtime(model, "speed")
    adapted = get_peft_model(model, LoraConfig(target_modules=["A.1"], init_lora_weights=False))
    y = products(adapted.base_model.model[0])[0]
    merged = adapted.merge_and_unload()[0]
    z, left = products(merged)
    assert left == 0
    assert not torch.equal(y, products(layer())[0])
    torch.testing.assert_close(z, y, rtol=2**-6, atol=2**-4)


def test_memory_is_not_taken_for_ragged_ranks_or_integers():
    assert layer(RANKS[0]).run_as("memory") is None
    assert packed(RANKS[1]).run_as("memory") is None
    assert layer(RANKS[1]).run_as("memory") == "heads together"
    assert layer(RANKS[1], torch.float32).run_as("speed") is None
    assert LowRankLinear(64, 64, 4, dtype=torch.bfloat16).run_as("speed") is None


def test_dtypes_and_copies():
    """Another dtype and back; a copy has weights of its own."""
    found = layer()
    expected = products(found)[0]
    found.run_as("auto")
    found.float()
    assert found.together is None
    assert all(head.weight.is_contiguous() for head in found.A)
    found.bfloat16()
    assert found.together is not None
    assert torch.equal(products(found)[0], expected)
    copy = deepcopy(found)
    copy.A[0].weight.data.zero_()
    assert torch.equal(products(found)[0], expected)
    assert not torch.equal(products(copy)[0], expected)


def test_a_compiled_and_an_exported_layer_is_the_same():
    found, x = layer(), torch.randn(1, 64).bfloat16()
    found.run_as("speed")
    with torch.no_grad():
        y = found(x)
        exported = torch.export.export(found, (x,)).module()
        compiled = torch.compile(found, fullgraph=True, backend="eager")
        torch.testing.assert_close(exported(x), y)
        torch.testing.assert_close(compiled(x), y)


def test_packed_heads_are_still_packed_linears():
    found = packed()
    found.run_as("speed")
    assert all(isinstance(head, PackedLinear) for head in found.A)
    assert torch.equal(found.to_dense().weight, packed().to_dense().weight)
