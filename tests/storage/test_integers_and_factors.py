"""Factors beside integers: small ranks, and a product that takes what rounding left."""

from typing import Any

import pytest
import torch

from helpers.matrices import normal
from helpers.problems import lost, problem
from spectrim.errors import ModelError
from spectrim.linear import Linear
from spectrim.maths.rounding import Grid, quantize
from spectrim.recipe import QuantizePart, StoragePart
from spectrim.storage import Problem, filled, form, made

BOTH = form("integers+factors")
RANK = 16


def spec_of(rank: int, parts: str, bits: int = 3, symmetric: bool = True) -> dict[str, Any]:
    grids = {"R": Grid(bits, 32, symmetric), "A": Grid(8, None, symmetric), "B": Grid(8, 32, symmetric)}
    return {"rank": rank, "grids": {part: grids[part].spec for part in parts}}


def layer_of(given: Problem, spec: dict[str, Any]) -> Any:
    out, size = given.W.shape
    linear = torch.nn.Linear(size, out, bias=False, dtype=given.linear.dtype)
    return filled(linear, "integers+factors", spec, made(given, "integers+factors", spec))


@pytest.mark.parametrize("metrics", ["inputs", "both"])
@pytest.mark.parametrize("parts", ["R", "ABR"])
def test_factors_beside_integers_take_what_rounding_left(metrics: str, parts: str) -> None:
    """All that the first directions of the rest cost, but for the rounding of integer factors."""
    given = problem(metrics=metrics, quantize=QuantizePart(bits="auto", damping=0.01))
    C, G = given.C, given.G
    layer = layer_of(given, spec_of(4, parts))
    R = quantize(given.W, layer.R.grid, C, G, damping=(0.01, 0.01), dtype=torch.float32).dense()
    assert torch.equal(layer.R.unpacked(), R.float())
    left, right = (torch.eye(n).double() if M is None else torch.linalg.cholesky(M) for M, n in ((G, 24), (C, 32)))
    sigma = torch.linalg.svdvals(left.T @ (given.W.double() - R) @ right)
    wanted = float(sigma[4:].square().sum())
    assert lost(given, layer.product().detach()) == pytest.approx(wanted, rel=1e-4 if parts == "R" else 0.05)
    assert lost(given, R) == pytest.approx(float(sigma.square().sum()))


def test_options_are_small_ranks_beside_few_bits() -> None:
    for size, multiple, ranks in ((24, 1, range(1, 5)), (64, 1, (8, 16, 24, 32)), (40, 1, (8, 16)), (24, 5, (5, 10))):
        part = QuantizePart(bits="auto", group=32, symmetric=False)
        given = problem(size, size, metrics="none", storage=StoragePart(multiple=multiple), quantize=part)
        options = BOTH.options(given)
        specs = [options.spec(number) for number in range(len(options.bytes))]
        assert [(spec["grids"]["R"]["bits"], spec["rank"]) for spec in specs] == [
            (b, k) for b in (2, 3, 4) for k in ranks
        ]
        assert all({grid["bits"] for name, grid in spec["grids"].items() if name != "R"} == {8} for spec in specs)
        assert not any(grid["symmetric"] for spec in specs for grid in spec["grids"].values())


@pytest.mark.parametrize("shape", [(32, 64), (64, 32)])
def test_directions_of_what_rounding_left_are_predicted(shape: tuple[int, int]) -> None:
    """More of them remove more, never all; and what they remove is what they remove in truth."""
    part = QuantizePart(bits="auto", group=32, damping=0.01)
    given = problem(*shape, floor=0.5, quantize=part, dtype=torch.float64)
    options, alone = BOTH.options(given), form("integers").options(given)
    for bits in range(3):
        numbers = range(bits * 2, bits * 2 + 2)
        costs = [float(alone.error[bits]), *(float(options.error[number]) for number in numbers)]
        assert costs == sorted(costs, reverse=True)
        assert costs[-1] > 0
        true = [lost(given, layer_of(given, options.spec(number)).product()) for number in numbers]
        for a, b in zip(costs[1:], true, strict=True):
            assert a == pytest.approx(b, rel=0.3)


def test_there_are_none_where_bits_are_fixed_or_heads_apart() -> None:
    for given in (
        problem(quantize=QuantizePart(bits=4)),
        problem(quantize=QuantizePart()),
        problem(heads=4, quantize=QuantizePart(bits="auto")),
    ):
        assert not len(BOTH.options(given).bytes)


def test_float_factors_beside_integers_are_balanced_direction_by_direction() -> None:
    """Under a metric whose inputs have very different units, float16 holds them as well as float32."""
    W = normal(48, 64)
    units = 2.0 ** torch.linspace(-12, 12, 64).round().double()
    errors = {}
    for dtype in (torch.float16, torch.float32):
        linear = Linear("a", "backbone", None, "up", 48, 64, None, dtype)
        part = QuantizePart(bits="auto")
        given = Problem(linear, lambda: W, lambda: (units.square(), None), StoragePart(), part)
        spec = {"rank": RANK, "grids": {"R": {"bits": 4, "group": 32, "symmetric": True}}}
        layer = layer_of(given, spec)
        A, B = layer.factors()
        ratio = (A.double().abs().amax(0) / B.double().abs().amax(1)).log2().abs()
        assert (ratio <= 1.1).all()
        assert all(part.isfinite().all() for part in (A, B))
        errors[dtype] = lost(given, layer.double().product().detach())
    assert errors[torch.float16] < 1.05 * errors[torch.float32]


def test_a_weight_that_integers_hold_leaves_factors_of_zero() -> None:
    W = torch.randint(-8, 8, (24, 32), generator=torch.Generator().manual_seed(0)).float()
    W[:, 0], W[:, 1] = -8, 7  # the range of every group is that of the codes
    given = problem(metrics="none", quantize=QuantizePart(bits="auto", group=32))
    given = Problem(given.linear, lambda: W, given.metrics, given.storage, given.quantize)
    for parts in ("R", "ABR"):
        layer = layer_of(given, spec_of(2, parts, bits=4, symmetric=False))
        assert torch.equal(layer.product().detach(), W)


def test_grids_that_cannot_be_made_are_refused() -> None:
    linear = Linear("a", "backbone", None, "q", 24, 32, 4, torch.float32)
    grid = {"bits": 4}
    for parts in ("AR", "BR"):
        with pytest.raises(ModelError, match="where they can be made for R or A, B, R alone"):
            BOTH.check(linear, {"rank": 4, "grids": dict.fromkeys(parts, grid)})
    with pytest.raises(ModelError, match="integers are made with one rank, not with ranks by head; give it one"):
        BOTH.check(linear, {"rank": [2] * 4, "grids": {"R": grid}})
    with pytest.raises(ModelError, match="parts A, B make the form 'integer-factors'; name that one"):
        BOTH.check(linear, {"rank": 4, "grids": {"A": grid, "B": grid}})
