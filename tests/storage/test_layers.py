import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from compressed import assembled
from helpers.exchanged import pack_linears, replace_linears
from spectrim.errors import ModelError
from spectrim.maths.decompose import Rank, head_ranks
from spectrim.maths.rounding import Grid, quantize
from spectrim.storage.layers import LowRankLinear


def filled(
    in_features: int,
    out_features: int,
    rank: Rank,
    bias: bool = True,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> LowRankLinear:
    layer = LowRankLinear(in_features, out_features, rank, bias, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


sizes = st.integers(1, 7)
ranks = sizes | st.lists(sizes, min_size=1, max_size=4).map(tuple)


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, ranks, st.booleans(), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 99))
def test_is_the_linear_map_of_the_product(
    n: int, width: int, rank: Rank, bias: bool, leading: list[int], seed: int
) -> None:
    layer = filled(n, width * len(head_ranks(rank)), rank, bias, seed=seed)
    x = torch.randn(*leading, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    product = torch.einsum("ok,ki->oi", assembled(layer), layer.B.weight)
    expected = functional.linear(x, product, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    dense = layer.to_dense()
    assert dense.bias is None or dense.bias is not layer.bias
    torch.testing.assert_close(dense(x), expected)
    for rows, k in zip(dense.weight.chunk(len(head_ranks(rank))), head_ranks(rank), strict=True):
        assert torch.linalg.matrix_rank(rows).item() <= k


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, ranks, st.integers(0, 99))
def test_loads_the_factors_that_it_is_given(n: int, width: int, rank: Rank, seed: int) -> None:
    source = filled(n, width * len(head_ranks(rank)), rank, bias=False, seed=seed)
    layer = LowRankLinear(n, source.out_features, rank, bias=False, dtype=torch.float64)
    layer.load_factors(assembled(source), source.B.weight)
    assert all(torch.equal(mine, its) for mine, its in zip(layer.parameters(), source.parameters(), strict=True))
    assert layer.B.weight.requires_grad


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(1, 4), st.integers(0, 99))
def test_full_rank_by_head_is_the_dense_layer(n: int, width: int, heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    dense = nn.Linear(n, heads * width, dtype=torch.float64)
    model = nn.Sequential(dense)
    replace_linears(model, {"0": (min(width, n),) * heads})
    A, B = [], []
    for rows in dense.weight.detach().chunk(heads):
        U, s, Vh = torch.linalg.svd(rows, full_matrices=False)
        A.append(U)
        B.append(s[:, None] * Vh)
    model[0].load_factors(torch.block_diag(*A), torch.cat(B))
    x = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(model(x), dense(x))
    torch.testing.assert_close(model[0].to_dense().weight, dense.weight)


def test_the_latent_is_that_of_the_heads_one_after_another() -> None:
    layer = filled(6, 8, (3, 1), bias=False)
    x = torch.randn(2, 6, dtype=torch.float64)
    latent = layer.B(x)
    assert latent.shape == (2, 4)
    for h, (part, rows) in enumerate(zip(latent.split([3, 1], dim=-1), layer(x).chunk(2, dim=-1), strict=True)):
        torch.testing.assert_close(part @ layer.A[h].weight.T, rows)


def test_children_and_tensor_names() -> None:
    layer = LowRankLinear(5, 3, 2)
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "A.weight": (3, 2),
        "B.weight": (2, 5),
        "bias": (3,),
    }
    assert type(layer.A) is nn.Linear
    assert type(layer.B) is nn.Linear
    assert LowRankLinear(5, 3, 2, bias=False).bias is None


def test_children_and_tensor_names_by_head() -> None:
    layer = LowRankLinear(5, 6, (2, 1, 2))
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "A.0.weight": (2, 2),
        "A.1.weight": (2, 1),
        "A.2.weight": (2, 2),
        "B.weight": (5, 5),
        "bias": (6,),
    }
    assert {type(head) for head in layer.A} == {type(layer.B)} == {nn.Linear}
    assert "rank=(2, 1, 2)" in repr(layer)
    single = LowRankLinear(5, 6, (2,), bias=False)  # one key/value head
    assert list(single.state_dict()) == ["B.weight", "A.0.weight"]


@pytest.mark.parametrize("rank", [2, (2, 1, 1)])
def test_an_unfilled_layer_shows_in_its_output(rank: Rank) -> None:
    layer = LowRankLinear(5, 3, rank)
    assert all(parameter.isnan().all() for parameter in layer.parameters())
    assert layer(torch.ones(1, 5)).isnan().all()


def test_gradients_reach_both_factors_and_the_bias() -> None:
    layer = filled(4, 3, 2)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 3, dtype=torch.float64)
    layer(x).backward(upstream)
    A, B = layer.A.weight, layer.B.weight
    torch.testing.assert_close(A.grad, upstream.T @ (x @ B.T))
    torch.testing.assert_close(B.grad, (upstream @ A).T @ x)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))
    torch.testing.assert_close(x.grad, upstream @ A @ B)


def test_gradients_reach_every_head() -> None:
    layer = filled(4, 6, (2, 3))
    x = torch.randn(5, 4, dtype=torch.float64)
    upstream = torch.randn(5, 6, dtype=torch.float64)
    layer(x).backward(upstream)
    A, B = assembled(layer).detach(), layer.B.weight
    torch.testing.assert_close(B.grad, (upstream @ A).T @ x)
    whole = upstream.T @ (x @ B.T)  # as if A were one matrix
    torch.testing.assert_close(layer.A[0].weight.grad, whole[:3, :2])
    torch.testing.assert_close(layer.A[1].weight.grad, whole[3:, 2:])


@pytest.mark.parametrize("rank", [16, (16, 9)])
def test_low_precision_keeps_its_dtype_and_merges_in_single_precision(rank: Rank) -> None:
    layer = filled(64, 48, rank, dtype=torch.bfloat16)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    dense = layer.to_dense()
    exact = assembled(layer).double() @ layer.B.weight.double()
    assert dense.weight.dtype == torch.bfloat16
    # One rounding to 8 bits of mantissa, besides the error of a float32 sum of 16 terms.
    torch.testing.assert_close(dense.weight.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("rank", [3, (3, 1)])
def test_compiles_without_a_graph_break(rank: Rank) -> None:
    layer = filled(8, 6, rank, dtype=torch.float32)
    x = torch.randn(2, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_merging_refuses_what_it_would_lose() -> None:
    with pytest.raises(ModelError, match="meta device"):
        LowRankLinear(4, 3, 2, device="meta").to_dense()
    layer = filled(4, 3, 2)
    layer.A = nn.Sequential(layer.A, nn.Identity())
    with pytest.raises(ModelError, match="factor A is a Sequential"):
        layer.to_dense()
    layer = filled(4, 6, (2, 1))
    layer.A[1] = nn.Sequential(layer.A[1], nn.Identity())
    with pytest.raises(ModelError, match=r"factor A\.1 is a Sequential"):
        layer.to_dense()
    with pytest.raises(ModelError, match="meta device"):
        LowRankLinear(4, 6, (2, 1), device="meta").to_dense()


@pytest.mark.parametrize("rank", [0, (), (2, 0)])
def test_impossible_ranks_are_refused(rank: Rank) -> None:
    with pytest.raises(ModelError, match="rank of at least 1"):
        LowRankLinear(4, 6, rank)


def test_heads_of_unequal_size_are_refused() -> None:
    with pytest.raises(ModelError, match="7 outputs are not 2 equal heads"):
        LowRankLinear(4, 7, (2, 1))


def test_factors_that_do_not_fit_are_refused_and_change_nothing() -> None:
    layer = filled(4, 6, (2, 1))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    A, B = assembled(layer).detach().clone(), torch.ones(3, 4)
    for wrong_A, wrong_B in ((A[:, :1], B), (A, B[:1]), (A[:3], B), (A, B.T)):  # a row or column would be repeated
        with pytest.raises(ModelError, match=r"do not fit a layer that takes \[6, 3\] and \[3, 4\]"):
            layer.load_factors(wrong_A, wrong_B)
    for value in (1e-30, torch.nan):
        A[3, 1] = value  # the second head's row, the first head's column
        with pytest.raises(ModelError, match="not zero outside the rows of its head"):
            layer.load_factors(A, B)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    with pytest.raises(ModelError, match="meta device"):
        LowRankLinear(4, 6, 3, device="meta").load_factors(torch.ones(6, 3), B)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_rest_beside_the_factors_is_added(symmetric):
    """``y = A (B x) + R x + bias``, as a layer and as the dense one."""
    model = nn.Sequential(filled(32, 6, 3))
    layer = model[0]
    grid = Grid(3, 32, symmetric)
    rest = quantize(torch.randn(6, 32, generator=torch.Generator().manual_seed(7)), grid)
    pack_linears(model, {"0.R": grid})
    layer.R.load(rest)
    x = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    W = assembled(layer) @ layer.B.weight + rest.dense()
    torch.testing.assert_close(layer(x), functional.linear(x, W, layer.bias))
    torch.testing.assert_close(layer.to_dense().weight, W)


def test_the_dense_layer_of_a_rest_is_rounded_once():
    model = nn.Sequential(filled(64, 48, 24, dtype=torch.bfloat16))
    grid = Grid(8, 32)
    pack_linears(model, {"0.R": grid})
    layer = model[0]
    layer.R.load(quantize(torch.randn(48, 64, generator=torch.Generator().manual_seed(7)), grid, dtype=torch.bfloat16))
    exact = layer.A.weight.float() @ layer.B.weight.float() + layer.R.weight.float()
    assert torch.equal(layer.to_dense().weight, exact.bfloat16())


def test_parts_become_integers_by_name() -> None:
    """An empty layer in the place of each, in the dtype and mode of the others; the form and spec say so."""
    layer = LowRankLinear(64, 6, (3, 4), dtype=torch.bfloat16).eval()
    assert (layer.form, layer.spec) == ("low-rank", {"rank": [3, 4], "pivoted": False})
    layer.pack("A.1", Grid(8, None))
    assert (layer.form, list(layer.spec["grids"])) == ("low-rank", ["A.1"])
    layer.pack("B", Grid(4, 32, symmetric=False))
    assert layer.form == "integer-factors"
    layer.pack("R", Grid(2, 64))
    assert layer.form == "integers+factors"
    grids = {name: Grid(**grid) for name, grid in layer.spec["grids"].items()}
    assert grids == {"A.1": Grid(8, None), "B": Grid(4, 32, symmetric=False), "R": Grid(2, 64)}
    assert not any(module.training for module in layer.modules())
    assert {part.weight_scale.dtype for part in (layer.A[1], layer.B, layer.R)} == {torch.bfloat16}
    assert type(layer.A[0]) is nn.Linear
    with pytest.raises(ModelError, match="packed factors take codes, not numbers; load factors before they are packed"):
        layer.load_factors(torch.ones(6, 7), torch.ones(7, 64))


@pytest.mark.parametrize(
    ("part", "grid", "message"),
    [
        ("C", Grid(4, None), "a layer of factors has no part 'C'; its parts are B, A and R"),
        ("A.0", Grid(4, None), "no part 'A.0'"),
        ("B", Grid(4, 48), "groups of 48 do not divide 64 inputs"),
        ("A", Grid(4, 2), "groups of 2 do not divide 3 inputs"),
    ],
)
def test_parts_and_grids_that_do_not_fit_change_nothing(part: str, grid: Grid, message: str) -> None:
    layer = filled(64, 6, 3)
    before = dict(layer.named_modules())
    with pytest.raises(ModelError, match=message):
        layer.pack(part, grid)
    assert dict(layer.named_modules()) == before
