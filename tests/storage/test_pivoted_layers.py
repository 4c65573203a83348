"""Layers that are stored by pivots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.exchanged import replace_linears
from helpers.matrices import normal
from spectrim.errors import ModelError
from spectrim.maths.rounding import Grid
from spectrim.storage.layers import LowRankLinear


def filled(size: int, out: int, rank: int, bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0):
    layer = LowRankLinear(size, out, rank, bias, pivoted=True, dtype=dtype)
    layer.load_factors(normal(out, rank, seed=seed), normal(rank, size, seed=seed + 1))
    if bias:
        with torch.no_grad():
            layer.bias.copy_(normal(out, seed=seed + 2))
    return layer


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 7), st.integers(2, 9), st.data(), st.booleans(), st.lists(st.integers(0, 3), max_size=2),
)  # fmt: skip
def test_is_the_linear_map_of_the_product(size, out, data, bias, leading):
    rank, seed = data.draw(st.integers(1, out - 1)), data.draw(st.integers(0, 99))
    layer = filled(size, out, rank, bias, seed=seed)
    W, x = normal(out, rank, seed=seed) @ normal(rank, size, seed=seed + 1), normal(*leading, size, seed=seed + 3)
    expected = nn.functional.linear(x, W, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    dense = layer.to_dense()
    torch.testing.assert_close(dense.weight, W, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense(x), expected, rtol=1e-9, atol=1e-9)
    stored = layer.state_dict()
    stored.pop("bias", None)
    assert sum(tensor.numel() for tensor in stored.values()) == rank * (size + out - rank) + rank


def test_children_tensor_names_and_dtypes():
    layer = LowRankLinear(5, 6, 2, pivoted=True, dtype=torch.bfloat16)
    assert {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()} == {
        "A.weight": ((4, 2), torch.bfloat16),
        "B.weight": ((2, 5), torch.bfloat16),
        "bias": ((6,), torch.bfloat16),
        "pivots": ((2,), torch.int32),
    }
    assert {type(layer.A), type(layer.B)} == {nn.Linear}
    assert "pivoted=True" in repr(layer)
    assert layer(torch.ones(1, 5, dtype=torch.bfloat16)).isnan().all()  # nobody filled it
    layer.float()
    assert (layer.pivots.dtype, layer.order.dtype) == (torch.int32, torch.int64)


def test_a_state_dict_brings_the_order_of_the_rows():
    layer, other = filled(4, 7, 3), LowRankLinear(4, 7, 3, pivoted=True, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    x = normal(2, 4)
    assert torch.equal(other(x), layer(x))
    with torch.device("meta"):
        empty = LowRankLinear(4, 7, 3, pivoted=True, dtype=torch.float64)
    with pytest.raises(ModelError, match="meta device"):
        empty.loaded()
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


def test_gradients_reach_both_factors_and_the_bias():
    layer, x, upstream = filled(4, 6, 2), normal(5, 4, seed=7).requires_grad_(), normal(5, 6, seed=8)
    layer(x).backward(upstream)
    A, B = layer.A.weight, layer.B.weight
    own = upstream[:, layer.pivots.long()]
    others = upstream[:, [row for row in range(6) if row not in layer.pivots.tolist()]]
    torch.testing.assert_close(A.grad, others.T @ (x @ B.T))
    torch.testing.assert_close(B.grad, (own + others @ A).T @ x)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))
    torch.testing.assert_close(x.grad, upstream @ layer.to_dense().weight)


def test_compiles_without_a_graph_break():
    layer, x = filled(8, 6, 3, dtype=torch.float32), torch.randn(2, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_what_cannot_be_pivoted_is_refused():
    with pytest.raises(ModelError, match="6 pivots of 6 rows are the dense weight"):
        LowRankLinear(8, 6, 6, pivoted=True)
    with pytest.raises(ModelError, match="pivots are rows of a whole layer"):
        LowRankLinear(8, 6, (2, 1), pivoted=True)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    with pytest.raises(ModelError, match="'0': 6 pivots"):
        replace_linears(model, {"0": 6}, {"0"})
    replace_linears(model, {"0": 2, "1": 2}, {"1"})
    assert model[0].pivots is None
    assert model[1].pivots is not None


@pytest.mark.parametrize("wrong", [[0, 5], [0, -1], [1, 1]])
def test_what_are_no_pivots_is_refused(wrong):
    layer = filled(4, 5, 2)
    with pytest.raises(ModelError, match="pivots"):
        layer.load_state_dict(layer.state_dict() | {"pivots": torch.tensor(wrong)})
    layer.pivots.copy_(torch.tensor(wrong))
    with pytest.raises(ModelError, match="pivots"):
        layer.loaded()


def test_no_grid_goes_with_pivots():
    layer = filled(32, 6, 2)
    for part in ("A", "B", "R"):
        with pytest.raises(ModelError, match="stored by pivots, whose factors cannot be integers; take the pivots or"):
            layer.pack(part, Grid(4, None))
