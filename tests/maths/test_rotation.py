"""Rotated inputs: exact in 16 bits, the same product, and the same error in rotated metrics."""

import pytest
import torch

from helpers.matrices import metric, normal
from spectrim.maths.rotation import BLOCK, matrix, turned, turned_back, turned_metric
from spectrim.maths.rounding import Grid, conditional, error, expected, on_grid, quantize
from spectrim.storage.packed import PackedLinear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_matrix_is_orthogonal_and_exact(dtype):
    R = turned(torch.eye(2 * BLOCK, dtype=dtype))
    assert set(R.unique().tolist()) == {-0.25, 0.0, 0.25}
    assert torch.equal(R @ R.T, torch.eye(2 * BLOCK, dtype=dtype))
    assert R[:BLOCK].sum(0).unique().numel() > 2  # a constant is spread, too


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_products_are_the_same(dtype):
    W, x = normal(5, 48).to(dtype), normal(2, 3, 48, seed=1).to(dtype)
    close = {} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.2}
    torch.testing.assert_close(turned(x) @ turned(W).T, x @ W.T, **close)
    torch.testing.assert_close(turned_back(turned(W)), W, **close)


def test_gradients_pass():
    assert torch.autograd.gradcheck(turned, (normal(3, 2 * BLOCK).requires_grad_(True),))


def test_what_was_made_while_nothing_is_trained_can_be_trained_with():
    with torch.inference_mode():
        turned(torch.ones(1, BLOCK, dtype=torch.float16))
    x = torch.ones(1, BLOCK, dtype=torch.float16, requires_grad=True)
    turned(x).float().square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_code_with_it_is_compiled_whole(context):
    torch._dynamo.reset()
    layer = PackedLinear(64, 24, Grid(4, 32, rotated=True), bias=False, dtype=torch.float32)
    layer.load(quantize(normal(24, 64), layer.grid, dtype=torch.float32))
    x = normal(3, 64).float()
    with context():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    assert torch.equal(turned(x, matrix(torch.bfloat16)), turned(x))


def test_metrics_are_those_of_rotated_inputs():
    x = normal(40, 48)
    C = x.T @ x
    before = C.clone()
    torch.testing.assert_close(turned_metric(C), turned(x).T @ turned(x))
    assert torch.equal(C, before)
    assert on_grid(None, Grid(3, None, rotated=True)) is None
    assert on_grid(C, Grid(3, None)) is C


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
def test_rounding_is_that_of_the_rotated_problem(group, symmetric, both):
    W, C, G = normal(24, 64), metric(64, 1), metric(24, 2) if both else None
    found = quantize(W, Grid(3, group, symmetric, rotated=True), C, G)
    inside = quantize(turned(W), Grid(3, group, symmetric), turned_metric(C), G)
    assert torch.equal(found.codes, inside.codes)
    assert torch.equal(found.scale, inside.scale)
    torch.testing.assert_close(found.dense(), turned_back(inside.dense()))
    assert error(W - found.dense(), C, G) == pytest.approx(error(turned(W) - inside.dense(), turned_metric(C), G))


def test_the_predicted_error_is_that_of_the_rotated_problem():
    W, C, weights = normal(24, 64), metric(64, 1), torch.linspace(1, 2, 24, dtype=torch.float64)
    grid = Grid(3, 32, rotated=True)
    inputs = conditional(on_grid(C, grid), 64, W)
    plain = expected(turned(W), Grid(3, 32), conditional(turned_metric(C), 64, W), weights)
    assert torch.equal(expected(W, grid, inputs, weights), plain)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_pays_where_few_inputs_are_large(bits):
    W = normal(32, 64)
    W[:, ::16] *= 8
    lost = [error(W - quantize(W, Grid(bits, None, rotated=x)).dense()) for x in (False, True)]
    assert lost[1] < 0.5 * lost[0]


def test_a_diagonal_metric_is_a_matrix_for_rotated_inputs():
    W, C = normal(24, 64), metric(64, 1).diagonal()
    grid = Grid(3, 32, rotated=True)
    assert torch.equal(on_grid(C, grid), turned_metric(C.diag()))
    found = quantize(W, grid, C)
    assert torch.equal(found.codes, quantize(W, grid, C.diag()).codes)
    assert error(W - found.dense(), C) < error(W - quantize(W, Grid(2, 32), C).dense(), C)
