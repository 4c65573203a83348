"""Products of weights that lie in one tensor, for all of them at once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from families import FAMILIES, FURTHER
from spectrim.anatomy import anatomy
from spectrim.experts import stack_experts, unfused
from spectrim.kernels import stacked
from spectrim.storage import exchange, stored_layers
from spectrim.storage.runtime import set_runtime

SPECS: dict[str, Any] = {"dense": None, "factors": {"pivoted": False}, "pivots": {"pivoted": True}}
CHOSEN = torch.tensor([[0, 2], [3, 0], [0, 3], [2, 3], [3, 2]])  # one expert of four is not hit


@pytest.fixture(params=SPECS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["mixtral", "gpt_oss"])
def mixture(request: pytest.FixtureRequest, form: str) -> Iterator[tuple[nn.Module, Any]]:
    """A model whose experts are all in one form with random numbers, and those of one layer; gpt-oss has biases."""
    torch.manual_seed(0)
    model = (FAMILIES | FURTHER)[request.param]().double()
    linears = [x for x in anatomy(model).linears if x.expert is not None]
    if (spec := SPECS[form]) is not None:  # gate and up of one rank, down of another
        exchange(model, {x.name: ("low-rank", spec | {"rank": 7 if x.role == "down" else 9}) for x in linears})
    for layer in stored_layers(model).values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        if layer.pivots is not None:
            layer.pivots.copy_(torch.randperm(layer.out_features)[: layer.rank])
            layer.loaded()
    with torch.no_grad():
        yield model, next(module for module in model.modules() if unfused(module))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of weights of the products at once."""
    found: list[int] = []
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, W: found.append(len(W)) or real(x, W))
    return found


def outputs(experts: Any, one_by_one: bool = False, chosen: torch.Tensor = CHOSEN) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 64, dtype=torch.float64, generator=generator)
    weights = torch.rand(5, 2, dtype=torch.float64, generator=generator)
    rows = [slice(t, t + 1) for t in range(5)] if one_by_one else [slice(None)]
    return torch.cat([experts(x[row], chosen[row], weights[row]) for row in rows])


def test_experts_of_one_shape_run_at_once_and_give_the_same(mixture, products, form):
    model, experts = mixture
    expected, before = outputs(experts, one_by_one=True), {k: x.clone() for k, x in model.state_dict().items()}
    assert not products
    stack_experts(model)
    torch.testing.assert_close(outputs(experts), expected, rtol=0, atol=1e-12)
    assert products == [4] * (3 if form == "dense" else 6)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_whoever_watches_trains_or_changes_one_expert_gets_them_one_by_one(mixture, products):
    model, experts = mixture
    stack_experts(model)
    expected = outputs(experts)
    products.clear()
    seen: list[int] = []
    last = [module for module in experts.get_submodule("2").modules() if isinstance(module, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    torch.testing.assert_close(outputs(experts), expected, rtol=0, atol=1e-12)
    assert seen == [3]
    handle.remove()
    with torch.enable_grad():
        torch.testing.assert_close(outputs(experts).detach(), expected, rtol=0, atol=1e-12)
    last.weight.data = 2 * last.weight.data
    assert not torch.allclose(outputs(experts), expected)
    assert not products


def test_many_tokens_of_an_expert_or_few_experts_run_one_by_one(mixture, products, monkeypatch):
    model, experts = mixture
    stack_experts(model)
    outputs(experts)
    assert products
    products.clear()
    with monkeypatch.context() as patched:
        patched.setattr("spectrim.experts.ROWS", 2)  # expert 3 has more
        outputs(experts)
    with monkeypatch.context() as patched:
        patched.setattr(stacked, "_CALL", 0)  # nothing makes up for reading an expert that is not hit
        outputs(experts)
    outputs(experts, chosen=CHOSEN.clamp(3))
    assert not products


def test_layers_of_other_shapes_are_left_as_they_are():
    linears = [nn.Linear(4, 3), nn.Linear(4, 2)]
    before = [one.weight.data_ptr() for one in linears]
    stacked.stack(linears)
    assert [one.weight.data_ptr() for one in linears] == before
    assert stacked.together(linears, torch.float32, 3) is None
    alike = [nn.Linear(4, 3) for _ in range(3)]
    stacked.stack(alike)
    assert stacked.together(alike, torch.float32, 3) is not None
    assert stacked.together(alike, torch.float64, 3) is None


@pytest.mark.parametrize("runtime", ["auto", "reference"])
def test_the_reference_runs_them_one_by_one(runtime):
    model = (FAMILIES | FURTHER)["mixtral"]()
    anatomy(model)
    set_runtime(model, runtime)
    experts = next(module for module in model.modules() if unfused(module))
    gates = [experts.get_submodule(f"{number}.w1") for number in range(4)]
    assert (stacked.together(gates, torch.float32, 3) is not None) == (runtime == "auto")
