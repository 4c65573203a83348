"""Pivoted factors: exactness, bounded coefficients, rounding, and layers that hold them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.matrices import normal
from spectrim.errors import ModelError, NumericalError
from spectrim.maths.pivots import BOUND, pivoted, row_order
from spectrim.storage.layers import LowRankLinear, replace_linears


def rebuilt(p: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The matrix [out, in] that pivoted factors stand for, put together row by row."""
    rows, others = list(B), iter(A @ B)
    out, at = len(A) + len(B), dict(zip(p.tolist(), rows, strict=True))
    return torch.stack([at[row] if row in at else next(others) for row in range(out)])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of every shape and rank: graded, with repeated and zero rows, with zero columns, or all zero."""
    k, out, size = draw(st.integers(1, 12)), draw(st.integers(1, 24)), draw(st.integers(1, 16))
    k, seed = min(k, out), draw(st.integers(0, 2**31))
    A, B = normal(out, k, seed=seed), normal(k, size, seed=seed + 1)
    A = A * 10.0 ** torch.linspace(0, -draw(st.integers(0, 12)), k, dtype=torch.float64)
    rank = draw(st.integers(0, k))
    how = draw(st.sampled_from(["full", "columns", "product", "repeated"]))
    if how == "columns":  # what decompose makes of a weight without energy in some directions
        A[:, rank:] = 0
    elif how == "product":
        A = A[:, :rank] @ normal(rank, k, seed=seed + 2)
    elif how == "repeated":
        A = A[torch.arange(out) // 2]
    return A, B


@settings(max_examples=300, deadline=None)
@given(pairs(), st.sampled_from([1.05, BOUND, 2.0]))
def test_exact_and_bounded_for_any_factors(pair, bound):
    A, B = pair
    p, coefficients, rows = pivoted(A, B, bound)
    out, k = A.shape
    assert (p.dtype, tuple(coefficients.shape), tuple(rows.shape)) == (torch.int64, (out - k, k), (k, B.shape[1]))
    assert p.tolist() == sorted(set(p.tolist()))
    W = A @ B
    torch.testing.assert_close(rebuilt(p, coefficients, rows), W, rtol=0, atol=1e-10 * float(1e-300 + W.abs().max()))
    assert coefficients.numel() == 0 or float(coefficients.abs().max()) <= bound


def test_many_swaps_at_once_are_exact_and_bounded():
    """LU alone leaves entries of 2 ** (k - 1) of this matrix (Wilkinson)."""
    k = 40
    A = torch.eye(k).tril(0).double() - torch.ones(k, k).tril(-1).double()
    A = torch.cat([A, -torch.ones(1, k).double(), normal(300, k)])
    p, coefficients, rows = pivoted(A, torch.eye(k).double())
    torch.testing.assert_close(rebuilt(p, coefficients, rows), A, rtol=0, atol=1e-10)
    assert float(coefficients.abs().max()) <= BOUND
    shuffled = normal(700, 500, seed=1)  # more candidates than are looked at together
    _, coefficients, _ = pivoted(shuffled, torch.eye(500).double(), 1.01)
    assert float(coefficients.abs().max()) <= 1.01


def test_factors_that_are_not_finite_are_refused():
    A, B = normal(5, 2), normal(2, 4)
    A[3, 1] = torch.nan
    with pytest.raises(NumericalError, match="factor A holds NaN"):
        pivoted(A, B)
    with pytest.raises(NumericalError, match="factor B holds NaN"):
        pivoted(normal(5, 2), B / 0)


@pytest.mark.parametrize(("shape", "k"), [((300, 300), 100), ((256, 96), 60), ((96, 256), 60)])
def test_rounding_to_bfloat16_costs_a_small_factor(shape, k):
    """Against plain factors of one rank, their values split evenly; measured at 1.8 to 2.5, growing with the rank."""
    U, _, V = torch.linalg.svd(normal(*shape), full_matrices=False)
    s = 1 / torch.arange(1, k + 1, dtype=torch.float64)
    A, B = U[:, :k] * s.sqrt(), s[:, None].sqrt() * V[:k]
    p, coefficients, rows = pivoted(A, B)
    half = [tensor.bfloat16().double() for tensor in (A, B, coefficients, rows)]
    plain = float((half[0] @ half[1] - A @ B).norm())
    assert float((rebuilt(p, half[2], half[3]) - A @ B).norm()) < 3 * plain


@pytest.mark.parametrize("wrong", [[0, 5], [0, -1], [1, 1]])
def test_what_are_no_pivots_is_refused(wrong):
    with pytest.raises(ValueError, match="pivots"):
        row_order(torch.tensor(wrong), 5)
    layer = filled(4, 5, 2)
    with pytest.raises(ModelError, match="pivots"):
        layer.load_state_dict(layer.state_dict() | {"pivots": torch.tensor(wrong)})


# ---- layers ----


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
        empty.find_order()
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
    with pytest.raises(ModelError, match="'1' has pivots and no rank"):
        replace_linears(model, {"0": 2}, {"1"})
    with pytest.raises(ModelError, match="'0': 6 pivots"):
        replace_linears(model, {"0": 6}, {"0"})
    replace_linears(model, {"0": 2, "1": 2}, {"1"})
    assert model[0].pivots is None
    assert model[1].pivots is not None
