"""Two factors in integers: which ranks are options, what each step of rounding is for, and scales of one size."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import families
from compressed import logits
from helpers.matrices import normal
from helpers.problems import lost, problem
from spectrim.anatomy import anatomy
from spectrim.checkpoint import load, save
from spectrim.errors import ModelError
from spectrim.linear import Linear
from spectrim.maths.decompose import decompose, sides
from spectrim.maths.rounding import Grid, conditional, error, expected, fitting_group, quantize
from spectrim.recipe import QuantizePart, StoragePart
from spectrim.storage import Problem, filled, form, made
from spectrim.storage.integer_factors import _balanced
from spectrim.storage.packed import PackedLinear

NORMAL = torch.finfo(torch.float16).smallest_normal
RANK = 16
INTEGER_FACTORS = form("integer-factors")


def spec_of(out: int, size: int, rank: int, bits: int, group: int | None = 32, symmetric: bool = True) -> Any:
    sizes = {"A": rank, "B": size}
    return {
        "rank": rank,
        "grids": {part: Grid(bits, fitting_group(n, group), symmetric).spec for part, n in sizes.items()},
    }


def layer_of(given: Problem, spec: Any) -> Any:
    out, size = given.W.shape
    linear = torch.nn.Linear(size, out, bias=False, dtype=given.linear.dtype)
    return filled(linear, "integer-factors", spec, made(given, "integer-factors", spec))


# ---- options ----


@pytest.mark.parametrize(
    ("size", "multiple", "ranks"),
    [
        (24, 1, range(1, 25)),
        (24, 5, range(5, 25, 5)),
        (40, 1, range(8, 41, 8)),
        (40, 12, range(12, 41, 12)),  # steps of 8, rounded up
        (128, 1, range(32, 129, 32)),
        (128, 48, range(48, 129, 48)),
    ],
)
def test_some_ranks_are_options_for_each_number_of_bits(size: int, multiple: int, ranks: range) -> None:
    parts = {"storage": StoragePart(multiple=multiple), "quantize": QuantizePart(bits="auto", group=32)}
    options = INTEGER_FACTORS.options(problem(size, size, metrics="none", **parts))
    specs = [options.spec(number) for number in range(len(options.bytes))]
    assert specs == [spec_of(size, size, k, bits) for bits in (2, 3, 4, 8) for k in ranks]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])
def test_the_predicted_error_adds_the_rounding_of_both_factors(shape: tuple[int, int], method: str) -> None:
    """B counts by direction alike, in nats, since AᵀGA is the identity; A by the values, since B C Bᵀ has them."""
    given = problem(*shape, quantize=QuantizePart(bits="auto", group=None, method=method, damping=0.05))
    options, W = INTEGER_FACTORS.options(given), given.W.double()
    found, nats = decompose(W, given.C, given.output), float(given.output.nats[0])
    A, B = sides(W, found.P, found.Q)
    by_input, by_output = given.C.diagonal(), given.G.diagonal()
    if method == "gptq":
        by_input, by_output = (conditional(M, len(M), W, 0.05) for M in (given.C, given.G))
    fed = method == "gptq"
    for number, predicted in enumerate(options.error):
        spec = options.spec(number)
        grid, k = Grid(**spec["grids"]["B"]), spec["rank"]
        rounding = expected(B[:k], grid, by_input, torch.full((k,), nats).double(), torch.float32, fed=fed).sum()
        # The scales of A are those of all directions, whatever the rank.
        rounding += expected(A, grid, found.s, by_output, torch.float32, fed=fed)[:, :k].sum()
        assert predicted == pytest.approx(float(found.loss[k:].sum() + rounding), rel=1e-5)


def test_there_are_none_by_head() -> None:
    given = problem(24, 20, heads=4, quantize=QuantizePart(bits="auto"))
    assert not len(INTEGER_FACTORS.options(given).bytes)
    linear = Linear("a", "backbone", None, "q", 24, 20, 4, torch.float32)
    grids = {part: {"bits": 4} for part in ("A.0", "A.1", "A.2", "A.3", "B")}
    with pytest.raises(ModelError, match=r"it has grids for A\.0, .*, B, where they can be made for A, B alone"):
        INTEGER_FACTORS.check(linear, {"rank": [1] * 4, "grids": grids})


def test_both_factors_have_grids() -> None:
    linear = Linear("a", "backbone", None, "q", 24, 20, 4, torch.float32)
    with pytest.raises(ModelError, match="it has grids for B, where they can be made for A, B alone"):
        INTEGER_FACTORS.check(linear, {"rank": 4, "grids": {"B": {"bits": 4}}})
    with pytest.raises(ModelError, match="parts without grids make the form 'low-rank'; name that one"):
        INTEGER_FACTORS.check(linear, {"rank": 4})
    with pytest.raises(ModelError, match="stored by pivots"):
        INTEGER_FACTORS.check(linear, {"rank": 4, "pivoted": True, "grids": {"A": {"bits": 4}, "B": {"bits": 4}}})


# ---- step by step ----


@pytest.mark.parametrize("decay", [0.3, 1.5])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_second_factor_makes_up_for_the_rounding_of_the_first(bits: int, decay: float) -> None:
    """A is that of the exact B, or least squares to the rounded one where that is better after its own rounding."""
    better = 0
    for seed in range(4):
        given = problem(seed=seed, decay=decay, floor=1e-3, quantize=QuantizePart(bits=4, damping=0.01))
        W, C, G = given.W.double(), given.C, given.G
        layer, found = layer_of(given, spec_of(24, 32, 8, bits)), decompose(W, C, given.output)
        options = {"dtype": torch.float32, "damping": (0.01, 0.01)}
        B = quantize(found.Q[:, :8].T @ W, layer.B.grid, C, **options).dense()
        R = torch.linalg.cholesky(C)
        fitted = torch.linalg.lstsq((B @ R).T, (W @ R).T).solution.T
        exact, fitted = (quantize(X, layer.A.grid, B @ C @ B.T, G, **options) for X in (found.P[:, :8], fitted))
        costs = [error(W - X.dense() @ B, C, G) for X in (exact, fitted)]
        better += costs[1] < costs[0]
        # Two ways to solve differ in their last digits, which can move a code of so few to its neighbour.
        assert lost(given, layer.product()) == pytest.approx(min(costs), rel=1e-2)
    assert better >= 3 if decay < 1 else better < 4


def test_rounding_to_nearest_looks_at_no_metric() -> None:
    given = problem(quantize=QuantizePart(bits=4, method="rtn"))
    layer, found = layer_of(given, spec_of(24, 32, 8, 4)), decompose(given.W, given.C, given.output)
    scales = []
    for part, X in (("A", found.P[:, :8]), ("B", found.Q[:, :8].T @ given.W.double())):
        packed = layer.get_submodule(part)
        wanted = quantize(X, packed.grid, dtype=torch.float32)
        (scale,) = (packed.weight_scale / wanted.scale).unique().tolist()
        assert torch.equal(packed.unpacked(), scale * wanted.dense().float())
        scales.append(scale)
    assert scales[0] * scales[1] == 1  # and what moved is a power of two


# ---- scales of one size ----


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_lost_and_scales_are_normal_numbers(dtype, group, symmetric):
    """A is large, B is small, directions decay, and one of each says nothing."""
    A = normal(48, RANK) * 3e3
    B = normal(RANK, 64, seed=1) * 1e-7 * 0.7 ** torch.arange(RANK).double()[:, None]
    A[5], B[3] = 0, 0
    grids = [Grid(4, fitting_group(X.shape[1], group), symmetric) for X in (A, B)]
    before = [quantize(X, grid, dtype=torch.bfloat16) for X, grid in zip((A, B), grids, strict=True)]
    found = _balanced(*before, dtype)
    for after, same in zip(found, before, strict=True):
        assert after.scale.dtype == dtype
        assert torch.equal(after.codes, same.codes)
        assert NORMAL <= after.scale.abs().min() < after.scale.abs().max() < 100
    assert torch.equal(found[0].dense() @ found[1].dense(), before[0].dense() @ before[1].dense())


def shifted(linear: Linear, W: torch.Tensor, exponent: int) -> Problem:
    """With directions whose two sides are a power of two further apart, as a metric of other units makes them."""
    found = decompose(W)
    Q = found.P if found.Q is None else found.Q
    kept = replace(found, P=found.P * 2.0**exponent, Q=Q * 2.0**-exponent)
    C, part = torch.ones(linear.in_features, dtype=torch.float64), QuantizePart(bits="auto")
    return Problem(linear, lambda: W, lambda: (C, None), StoragePart(), part, kept=kept)


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (3, None, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_the_unit_of_a_metric_is_not_in_the_scales(name, dtype, bits, group, symmetric):
    linear = replace(anatomy(families.FAMILIES["llama"]()).linear(f"model.layers.0.mlp.{name}"), dtype=dtype)
    W = normal(linear.out_features, linear.in_features) * 0.02
    spec = spec_of(*W.shape, RANK, bits, group, symmetric)
    plain = made(shifted(linear, W, 0), "integer-factors", spec)
    for exponent in (-40, 40):
        tensors = made(shifted(linear, W, exponent), "integer-factors", spec)
        assert tensors.keys() == plain.keys()
        assert all(torch.equal(tensor, plain[key]) for key, tensor in tensors.items())
    assert min(plain[f"{name}.weight_scale"].abs().min() for name in "AB") >= NORMAL
    error, exact = (
        float((layer_of(shifted(replace(linear, dtype=kind), W, 0), spec).double().product() - W).norm() / W.norm())
        for kind in (dtype, torch.float64)
    )
    assert error < 1.05 * exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_computes_with_the_same_integers(dtype, tmp_path):
    model = families.FAMILIES["llama"]().to(dtype)
    for linear in anatomy(model).linears:
        dense = model.get_submodule(linear.name)
        how = {"bits": 4, "group": 32} if "mlp" in linear.name else {"bits": 8, "group": None}
        spec = spec_of(*dense.weight.shape, RANK, **how)
        tensors = made(shifted(linear, dense.weight.detach().double(), 20), "integer-factors", spec)
        model.set_submodule(linear.name, filled(dense, "integer-factors", spec, tensors))
    save(model, tmp_path / "a")
    wide, half = load(tmp_path / "a", dtype=torch.float32), load(tmp_path / "a", dtype=torch.float16)
    scales = [module.weight_scale for module in half.modules() if isinstance(module, PackedLinear)]
    assert len(scales) == 2 * len(anatomy(families.FAMILIES["llama"]()).linears)
    assert all(scale.abs().min() >= NORMAL and scale.isfinite().all() for scale in scales)
    expected, found = logits(wide), logits(half).float()
    assert float((found - expected).norm() / expected.norm()) < 5e-3
    if dtype == torch.bfloat16:  # scales of eight digits are the same numbers in both
        for a, b in zip(wide.modules(), half.modules(), strict=True):
            if isinstance(a, PackedLinear):
                assert torch.equal(a.weight_scale, b.weight_scale.float())
