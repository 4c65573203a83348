"""Factors whose numbers are of one size: powers of two move between A and B, and float16 holds what is left."""

from dataclasses import replace

import pytest
import torch
from spectrim.storage.make import _balanced, make_stored

import families
from compressed import logits
from helpers.matrices import normal
from spectrim.anatomy import anatomy
from spectrim.checkpoint import load, save
from spectrim.linear import Linear
from spectrim.maths.decompose import decompose, directions
from spectrim.maths.rounding import Grid, Quantized, fitting_group, quantize
from spectrim.plan.plan import Integers, plan_row
from spectrim.storage.packed import PackedLinear

NORMAL = torch.finfo(torch.float16).smallest_normal
RANK = 16


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_lost_and_scales_are_normal_numbers(dtype, group, symmetric):
    """A is large, B is small, directions decay, and one of each says nothing."""
    A = normal(48, RANK) * 3e3
    B = normal(RANK, 64, seed=1) * 1e-7 * 0.7 ** torch.arange(RANK).double()[:, None]
    A[5], B[3] = 0, 0
    grids = [Grid(4, fitting_group(X.shape[1], group), symmetric) for X in (A, B)]
    A, B = (quantize(X, grid, dtype=torch.bfloat16) for X, grid in zip((A, B), grids, strict=True))
    found = _balanced(A, B, dtype)
    for part, before in (("A", A), ("B", B)):
        assert found[part].scale.dtype == dtype
        assert torch.equal(found[part].codes, before.codes)
        assert NORMAL <= found[part].scale.min() < found[part].scale.max() < 100
    assert torch.equal(found["A"].dense() @ found["B"].dense(), A.dense() @ B.dense())


def stored(linear: Linear, W: torch.Tensor, how: Integers, exponent: int):
    """With directions whose two sides are a power of two further apart, as a metric of other units makes them."""
    values, P, Q = directions(decompose(W, None, None, 1), RANK)
    Q = P if Q is None else Q
    found = (values, P * 2.0**exponent, Q * 2.0**-exponent)
    given = None if how.residual is not None else found
    return make_stored(W, linear, plan_row(linear, RANK, integers=how), torch.ones(len(W.T)), None, found=given)


@pytest.mark.parametrize("how", [Integers(bits=4, group=32), Integers(bits=3, group=None, symmetric=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_the_unit_of_a_metric_is_not_in_the_scales(name, dtype, how):
    linear = replace(anatomy(families.FAMILIES["llama"]()).linear(f"model.layers.0.mlp.{name}"), dtype=dtype)
    W = normal(linear.out_features, linear.in_features) * 0.02
    plain = stored(linear, W, how, 0)
    for exponent in (-40, 40):
        shifted = stored(linear, W, how, exponent)
        for part, found in shifted.parts.items():
            assert isinstance(found, Quantized)
            assert torch.equal(found.codes, plain.parts[part].codes)
            assert torch.equal(found.scale, plain.parts[part].scale)
            assert found.scale.min() >= NORMAL
    error = float((plain.weight() - W).norm() / W.norm())
    exact = stored(replace(linear, dtype=torch.float64), W, how, 0)
    assert error < 1.05 * float((exact.weight() - W).norm() / W.norm())


def test_float_factors_beside_integers_are_balanced_direction_by_direction():
    A, B = normal(48, RANK), normal(RANK, 64, seed=1)
    spread = 2.0 ** torch.arange(-30, 34, 4).double()
    A[:, 7], B[9] = 0, 0
    found = _balanced(A * spread, B / spread[:, None], torch.float16)
    assert torch.equal(found["A"] @ found["B"], A @ B)
    columns, rows = found["A"].abs().amax(0), found["B"].abs().amax(1)
    live = (columns > 0) & (rows > 0)
    assert ((columns / rows)[live].log2().abs() <= 1).all()
    assert found["A"].half().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_computes_with_the_same_integers(dtype, tmp_path):
    model = families.FAMILIES["llama"]().to(dtype)
    for linear in anatomy(model).linears:
        W = model.get_submodule(linear.name).weight.detach().double()
        how = Integers(bits=4, group=32) if "mlp" in linear.name else Integers(bits=8, group=None)
        stored(linear, W, how, 20).put(model, linear.name, RANK)
    save(model, tmp_path / "a")
    wide, half = load(tmp_path / "a", dtype=torch.float32), load(tmp_path / "a", dtype=torch.float16)
    scales = [module.weight_scale for module in half.modules() if isinstance(module, PackedLinear)]
    assert len(scales) == 2 * len(anatomy(families.FAMILIES["llama"]()).linears)
    assert all(scale.min() >= NORMAL and scale.isfinite().all() for scale in scales)
    expected, found = logits(wide), logits(half).float()
    assert float((found - expected).norm() / expected.norm()) < 5e-3
    if dtype == torch.bfloat16:  # scales of eight digits are the same numbers in both
        for a, b in zip(wide.modules(), half.modules(), strict=True):
            if isinstance(a, PackedLinear):
                assert torch.equal(a.weight_scale, b.weight_scale.float())
