"""Integers of the experts of a layer in one product on a GPU, with the stand-in for humming (humming_stand_in.py)."""

import copy
import logging
import sys
from typing import Any

import pytest
import torch
from torch import nn

from families import FAMILIES, FURTHER
from spectrim.anatomy import anatomy
from spectrim.experts import unfused
from spectrim.kernels import grouped
from spectrim.maths.rounding import Grid, quantize
from spectrim.storage import exchange, stored_layers
from spectrim.storage.runtime import set_runtime

CHOSEN = torch.tensor([[0, 2], [3, 0], [0, 3], [2, 3], [3, 2]])  # one expert of four is not hit
GRIDS = [Grid(4, 32), Grid(3, 32, symmetric=False), Grid(8, None), Grid(4, 32, rotated=True)]


def mixture(family: str, grids: list[Grid]) -> tuple[nn.Module, Any]:
    """A model whose experts are integers with random numbers, expert e on grid e, and the experts of one layer."""
    torch.manual_seed(0)
    model = (FAMILIES | FURTHER)[family]().bfloat16().requires_grad_(False)
    chosen = {x.name: grids[x.expert % len(grids)] for x in anatomy(model).linears if x.expert is not None}
    exchange(model, {name: ("integers", vars(grid)) for name, grid in chosen.items()})
    for layer in stored_layers(model).values():
        W = torch.randn(layer.out_features, layer.in_features) / 8
        layer.load(quantize(W, layer.grid, dtype=torch.bfloat16))
        if layer.bias is not None:
            nn.init.normal_(layer.bias, std=0.3)
    return model, next(module for module in model.modules() if unfused(module))


@torch.no_grad()
def outputs(experts: Any, tokens: int = 5, chosen: torch.Tensor = CHOSEN) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    weights = torch.rand(5, 2, generator=generator).bfloat16()
    return experts(x[:tokens], chosen[:tokens], weights[:tokens])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03 * float(expected.float().abs().max()))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # gpt-oss has biases
@pytest.mark.parametrize("tokens", [1, 5])
def test_experts_on_one_grid_run_in_one_product_for_each_role(grouped_products, family, grid, tokens):
    model, experts = mixture(family, [grid])
    expected, before = outputs(experts, tokens), {k: x.clone() for k, x in model.state_dict().items()}
    set_runtime(model, "auto")
    assert set(grouped_products) == {4}  # the comparison with products one by one
    grouped_products.clear()
    close(outputs(experts, tokens), expected)
    assert grouped_products == [4, 4, 4]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_layouts_of_experts_lie_in_one_tensor_and_are_held_once(gpu):
    model, experts = mixture("mixtral", [GRIDS[0]])
    set_runtime(model, "auto")
    codes = [experts.get_submodule(f"{e}.w1").layout_codes for e in range(4)]
    assert {x.untyped_storage().data_ptr() for x in codes} == {codes[0].untyped_storage().data_ptr()}
    assert codes[0].untyped_storage().nbytes() == sum(x.nbytes for x in codes)
    set_runtime(model, "reference")
    assert not [name for name, _ in model.named_buffers() if ".layout_" in name]


@pytest.mark.parametrize("other", [Grid(3, 32), Grid(4, 32, rotated=True)])
def test_experts_on_several_grids_run_in_a_product_for_each(other, grouped_products):
    model, experts = mixture("gpt_oss", [Grid(4, 32), other, Grid(4, 32), other])
    expected = outputs(experts)
    set_runtime(model, "auto")
    grouped_products.clear()
    close(outputs(experts), expected)
    assert grouped_products == [2, 2, 2]  # experts 0 and 2; 3 is alone, since 1 is not hit
    close(outputs(experts, chosen=CHOSEN % 2), outputs_by_reference(model, experts, CHOSEN % 2))


def outputs_by_reference(model: nn.Module, experts: Any, chosen: torch.Tensor) -> torch.Tensor:
    set_runtime(model, "reference")
    return outputs(experts, chosen=chosen)


def test_one_expert_of_another_kind_runs_by_itself(grouped_products):
    model, experts = mixture("mixtral", [GRIDS[0]])
    dense = stored_layers(experts)["2.w1"].to_dense()
    experts.get_submodule("2").w1 = dense
    expected = outputs(experts)
    set_runtime(model, "auto")
    grouped_products.clear()
    close(outputs(experts), expected)
    assert sorted(grouped_products) == [3, 4, 4]


@pytest.mark.parametrize("change", ["hook", "layout", "first layout", "adapter", "copy"])
def test_whoever_watches_or_changes_an_expert_gets_those_of_its_role_one_by_one(grouped_products, change):
    model, experts = mixture("mixtral", [GRIDS[0]])
    expected = outputs(experts)
    set_runtime(model, "auto")
    layer, seen = experts.get_submodule("2").w1, []
    if change == "hook":
        layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    elif change == "layout":
        layer.run_as("reference")
    elif change == "first layout":
        experts.get_submodule("0").w1.run_as("reference")
    elif change == "adapter":
        experts.get_submodule("2").w1 = nn.Sequential(layer)
    else:
        experts.get_submodule("2").w1 = copy.deepcopy(layer)
    grouped_products.clear()
    close(outputs(experts), expected)
    assert grouped_products == [4, 4]
    assert seen == [3] * (change == "hook")


def test_gradients_and_no_tokens_go_one_by_one(grouped_products):
    model, experts = mixture("mixtral", [GRIDS[0]])
    expected = outputs(experts)
    set_runtime(model, "auto")
    grouped_products.clear()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    experts(x, CHOSEN, torch.ones(5, 2).bfloat16()).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        nobody = experts(x[:1], torch.full((1, 2), 4), torch.ones(1, 2).bfloat16())  # 4 stands for none
    assert torch.equal(nobody, torch.zeros(1, 64).bfloat16())
    assert not grouped_products
    close(outputs(experts), expected)


@pytest.mark.parametrize("fails", ["raises", "is off"])
def test_a_grouped_product_that_fails_is_left_out_and_that_is_said_once(grouped_products, gpu, caplog, fails):
    product = sys.modules["humming.forward"].humming_forward

    def broken(*args: Any, **more: Any) -> torch.Tensor:
        if "expert_layout" not in more:
            return product(*args, **more)
        if fails == "raises":
            raise AssertionError("no schedule")
        return product(*args, **more).flip(0)

    gpu.setattr(sys.modules["humming.forward"], "humming_forward", broken)
    model, experts = mixture("mixtral", [GRIDS[0]])
    expected = outputs(experts)
    with caplog.at_level(logging.WARNING, "spectrim"):
        assert set(set_runtime(model, "auto")) == {"humming"}
    (line,) = [record.getMessage() for record in caplog.records]
    assert "experts run one by one" in line
    assert ("no schedule" if fails == "raises" else "off by") in line
    grouped_products.clear()
    close(outputs(experts), expected)
    assert not grouped_products


def test_linears_without_a_layout_of_the_gpu_make_no_group():
    assert grouped.group([nn.Linear(4, 3), nn.Linear(4, 3)]) == []


def test_experts_with_a_block_of_all_tokens_run_at_once_too(grouped_products):
    """Llama 4's, whose routers give every expert all tokens, zeros where it was not chosen."""
    model, experts = mixture("llama4", [GRIDS[0]])
    x = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    x[torch.tensor([0, 0, 2, 3, 3]), torch.arange(5)] = 0
    x[1] = 0
    with torch.no_grad():
        expected = experts(x.flatten(0, 1))
        set_runtime(model, "auto")
        grouped_products.clear()
        found = experts(x.flatten(0, 1))
    close(found, expected)
    assert not found[~x.flatten(0, 1).any(-1)].any()
    assert grouped_products == [4, 4, 4]
