import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from spectrim.errors import ModelError
from spectrim.layers import LowRankLinear, replace_linears


def filled(
    in_features: int,
    out_features: int,
    rank: int,
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


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, st.booleans(), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 99))
def test_is_the_linear_map_of_the_product(n: int, m: int, rank: int, bias: bool, leading: list[int], seed: int) -> None:
    layer = filled(n, m, rank, bias, seed=seed)
    x = torch.randn(*leading, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    product = torch.einsum("ok,ki->oi", layer.A.weight, layer.B.weight)
    expected = functional.linear(x, product, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    dense = layer.to_dense()
    assert dense.bias is None or dense.bias is not layer.bias
    torch.testing.assert_close(dense(x), expected)
    assert torch.linalg.matrix_rank(dense.weight).item() <= rank


def test_children_and_tensor_names() -> None:
    layer = LowRankLinear(5, 3, 2)
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "A.weight": (3, 2),
        "B.weight": (2, 5),
        "bias": (3,),
    }
    assert type(layer.A) is nn.Linear
    assert type(layer.B) is nn.Linear
    assert not hasattr(layer, "weight")
    assert LowRankLinear(5, 3, 2, bias=False).bias is None


def test_an_unfilled_layer_shows_in_its_output() -> None:
    layer = LowRankLinear(5, 3, 2)
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


def test_low_precision_keeps_its_dtype_and_merges_in_single_precision() -> None:
    layer = filled(64, 48, 16, dtype=torch.bfloat16)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    dense = layer.to_dense()
    exact = layer.A.weight.double() @ layer.B.weight.double()
    assert dense.weight.dtype == torch.bfloat16
    # One rounding to 8 bits of mantissa, besides the error of a float32 sum of 16 terms.
    torch.testing.assert_close(dense.weight.double(), exact, rtol=2**-8, atol=1e-4)


def test_compiles_without_a_graph_break() -> None:
    layer = filled(8, 6, 3, dtype=torch.float32)
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
    with pytest.raises(ModelError, match="rank of at least 1"):
        LowRankLinear(4, 3, 0)


def two_layers() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 5, dtype=torch.bfloat16), nn.ModuleDict({"x": nn.Linear(5, 4, bias=False)})
    ).eval()


def test_replacement_keeps_shape_dtype_bias_and_mode() -> None:
    model = two_layers()
    bias = model[0].bias
    model[1]["x"].weight.requires_grad_(False)
    replace_linears(model, {"0": 3, "1.x": 2})
    first, second = model[0], model[1]["x"]
    assert first.bias is bias
    assert (first.in_features, first.out_features, first.rank) == (6, 5, 3)
    assert first.A.weight.dtype == first.B.weight.dtype == torch.bfloat16
    assert second.bias is None
    assert second.A.weight.dtype == torch.float32
    assert first.A.weight.requires_grad
    assert not second.A.weight.requires_grad
    assert not first.training


def test_replacement_on_the_meta_device_allocates_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5))
    replace_linears(model, {"0": 2})
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"0": 2, "nowhere.q": 2}, "no module 'nowhere.q'"),
        ({"0": 2, "1": 2}, "'1' is a ModuleDict"),
        ({"0": 2, "1.x": 0}, "at least 1"),
    ],
)
def test_a_wrong_name_changes_nothing(ranks: dict[str, int], message: str) -> None:
    model = two_layers()
    before = dict(model.named_modules())
    with pytest.raises(ModelError, match=message):
        replace_linears(model, ranks)
    assert dict(model.named_modules()) == before


def test_a_subclass_of_linear_is_not_replaced() -> None:
    model = nn.MultiheadAttention(8, 2)  # reads out_proj.weight without calling out_proj
    with pytest.raises(ModelError, match="NonDynamicallyQuantizableLinear"):
        replace_linears(model, {"out_proj": 2})
