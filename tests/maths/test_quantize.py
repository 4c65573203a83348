"""Integer weights: exact small cases, brute force, and the laws that error feedback must keep."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.matrices import metric, normal
from spectrim.errors import NumericalError
from spectrim.maths import rounding as room
from spectrim.maths.rounding import Grid, conditional, error, expected, fitting_group, quantize, scales
from spectrim.storage.packed import PackedLinear

grids = st.builds(Grid, st.sampled_from([2, 3, 4, 8]), st.sampled_from([None, 32]), st.booleans())


@settings(max_examples=60, deadline=None)
@given(grids, st.integers(1, 9), st.sampled_from([32, 64, 96]), st.integers(0, 2**31))
def test_codes_are_on_the_grid_and_nearest_without_a_metric(grid, out, size, seed):
    W = normal(out, size, seed=seed) + (seed % 3)
    found = quantize(W, grid, dtype=torch.bfloat16)
    assert found.codes.dtype == torch.int8
    assert int(found.codes.min()) >= -(2 ** (grid.bits - 1))
    assert int(found.codes.max()) < 2 ** (grid.bits - 1)
    assert found.scale.dtype == torch.bfloat16
    assert found.scale.shape == (out, size // (grid.group or size))
    assert (found.zero is None) == grid.symmetric
    # No other code of the same grid is nearer to any entry.
    each = size // found.scale.shape[1]
    step = found.scale.double().repeat_interleave(each, 1)
    zero = torch.zeros_like(step) if found.zero is None else found.zero.double().repeat_interleave(each, 1)
    codes = torch.arange(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1)).double()
    nearest = ((codes - zero[..., None]) * step[..., None] - W[..., None]).abs().amin(-1)
    torch.testing.assert_close((found.dense() - W).abs(), nearest, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_rounding_to_nearest_in_parts_of_the_rows_is_the_same(grid, out, weighed, seed):
    W = normal(out, 64, seed=seed)
    C = metric(64, seed).diagonal() if weighed else None
    at_once = quantize(W, grid, C)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_SLAB", 130)  # two rows
        assert [len(part) for part in room.slabs(W)] == [2] * (out // 2) + [1] * (out % 2)
        in_parts = quantize(W, grid, C)
    for name in ("codes", "scale", "zero"):
        one, other = getattr(at_once, name), getattr(in_parts, name)
        assert (one is None and other is None) or torch.equal(one, other)


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(0, 2**31))
def test_weights_that_lie_on_a_grid_come_back(grid, seed):
    codes = torch.randint(grid.low, grid.high + 1, (5, 64), generator=torch.Generator().manual_seed(seed)).double()
    codes[:, ::32], codes[:, 1::32] = grid.low, grid.high  # every group uses its whole range
    W = (codes - 1) * 0.25
    torch.testing.assert_close(quantize(W, replace(grid, symmetric=False)).dense(), W)


def test_identity_metrics_are_rounding_to_nearest():
    W, grid = normal(70, 96), Grid(3, 32)
    plain = quantize(W, grid)
    for C, G in itertools.product((None, torch.eye(96).double()), (None, torch.eye(70).double())):
        assert torch.equal(quantize(W, grid, C, G).codes, plain.codes)
    weighed = quantize(W, grid, torch.ones(96), 3 * torch.ones(70))
    assert torch.equal(weighed.codes, plain.codes)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([3, 4]), st.booleans(), st.integers(20, 150), st.sampled_from([32, 96, 160]), st.integers(0, 99))
def test_feedback_lowers_the_error_in_its_metric(bits, symmetric, out, size, seed):
    W, C, G = normal(out, size, seed=seed), metric(size, seed=seed + 1), metric(out, seed=seed + 2)
    grid = Grid(bits, 32, symmetric)

    def loss(C_used, G_used):
        return error(W - quantize(W, grid, C_used, G_used).dense(), C, G)

    nearest, inputs, outputs, both = loss(None, None), loss(C, None), loss(None, G), loss(C, G)
    assert both < min(inputs, outputs)
    assert max(inputs, outputs) < nearest


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([3, 4, 8]), st.booleans(), st.integers(40, 120), st.sampled_from([64, 160]), st.integers(0, 99))
def test_one_rounding_predicts_the_error_after_feedback(bits, symmetric, out, size, seed):
    W, grid = normal(out, size, seed=seed), Grid(bits, 32, symmetric)
    C, G = metric(size, seed=seed + 1, decay=1.0), metric(out, seed=seed + 2, decay=1.0)
    C, G = (M + 0.1 * M.diagonal().mean() * torch.eye(len(M)) for M in (C, G))
    for inputs, outputs in ((C, None), (None, G), (C, G)):
        reached = error(W - quantize(W, grid, inputs, outputs, damping=(0.01, 0.01)).dense(), inputs, outputs)
        weights = conditional(inputs, size, W, 0.01), conditional(outputs, out, W, 0.01)
        assert float(expected(W, grid, *weights).sum()) == pytest.approx(reached, rel=0.35)


def by_definition(W, found, C, G, grid):
    """Entry by entry: the code that makes |(Sᵀ E T)_ij| least, given all entries that it depends on."""
    T, S = (torch.linalg.cholesky(M.flip(0, 1)).flip(0, 1) for M in (C, G))
    E = torch.zeros_like(W)
    codes = torch.zeros_like(W)
    step = found.scale.double().repeat_interleave(W.shape[1] // found.scale.shape[1], 1)
    for i, j in itertools.product(range(W.shape[0]), range(W.shape[1])):
        choices = []
        for code in range(grid.low, grid.high + 1):
            E[i, j] = W[i, j] - code * step[i, j]
            choices.append((abs(float(S[: i + 1, i] @ E[: i + 1, : j + 1] @ T[: j + 1, j])), code))
        codes[i, j] = min(choices)[1]
        E[i, j] = W[i, j] - codes[i, j] * step[i, j]
    return codes


@pytest.mark.parametrize("tile", [2, 3, 64])
@pytest.mark.parametrize("sides", ["inputs", "outputs", "both"])
def test_the_definition_entry_by_entry(tile, sides, monkeypatch):
    monkeypatch.setattr(room, "_TILE", tile)
    monkeypatch.setattr(room, "_BLOCK", tile)
    W, grid = normal(7, 8), Grid(3, None)
    C, G = metric(8, seed=1), metric(7, seed=2)
    # Diagonals that fall keep the order of the entries.
    C, G = (M[order][:, order] for M in (C, G) for order in [M.diagonal().argsort(descending=True)])
    used = {"inputs": (C, None), "outputs": (None, G), "both": (C, G)}[sides]
    found = quantize(W, grid, *used, damping=(0, 0))
    C, G = (torch.eye(n).double() if M is None else M for M, n in zip(used, (8, 7), strict=True))
    assert torch.equal(found.codes.double(), by_definition(W, found, C, G, grid))


def test_close_to_the_best_of_all_codes():
    """Brute force over every matrix of codes of a 2 × 3 weight; Babai's bound on a grid without clipping."""
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=6))).double().view(-1, 2, 3)
    for seed in range(20):
        W, C, G = normal(2, 3, seed=seed), metric(3, seed=seed + 1, decay=0.5), metric(2, seed=seed + 2, decay=0.5)
        found = quantize(W, Grid(2, None), C, G, damping=(0, 0))
        step = found.scale.double()
        E = W - every * step
        best = float(((G @ E @ C) * E).sum((-2, -1)).min())
        reached = error(W - found.dense(), C, G)
        nearest = error(W - quantize(W, Grid(2, None)).dense(), C, G)
        assert best <= reached + 1e-12
        assert reached <= max(4 * best, nearest)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)), st.permutations(range(9)))
def test_the_order_of_inputs_and_outputs_does_not_matter(inputs, outputs):
    W, C, G, grid = normal(9, 12), metric(12, seed=1), metric(9, seed=2), Grid(4, None)
    found = quantize(W, grid, C, G).dense()
    moved = quantize(W[outputs][:, inputs], grid, C[inputs][:, inputs], G[outputs][:, outputs]).dense()
    torch.testing.assert_close(moved, found[outputs][:, inputs])


def test_metrics_without_full_rank_and_dead_layers():
    W, grid = normal(20, 32), Grid(4, 32, symmetric=False)
    thin = normal(32, 3) @ normal(32, 3).T
    for C in (thin @ thin.T, torch.zeros(32, 32).double()):
        assert quantize(W, grid, C, torch.zeros(20, 20).double()).dense().isfinite().all()
    found = quantize(torch.zeros(4, 32), grid)
    assert torch.equal(found.dense(), torch.zeros(4, 32).double())
    with pytest.raises(NumericalError, match="metric is not positive definite"):
        quantize(W, grid, -torch.eye(32).double())
    with pytest.raises(NumericalError, match="metric is not positive definite"):
        quantize(W, grid, torch.full((32, 32), torch.nan).double())


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(0, 2**31))
def test_ranges_are_no_worse_than_whole_ones(grid, seed):
    W, weights = normal(6, 64, seed=seed), normal(64, seed=seed + 1).exp()
    W[:, ::17] *= 6  # outliers
    step, zero = scales(W, grid, weights)
    X = W.view(6, -1, grid.group or 64)
    low, high = X.amin(-1, keepdim=True).clamp_max(0), X.amax(-1, keepdim=True).clamp_min(0)
    if grid.symmetric:
        whole, origin = 2 * X.abs().amax(-1, keepdim=True) / (2**grid.bits - 1), 0
    else:
        whole = (high - low) / (2**grid.bits - 1)
        origin = (grid.low - low / whole).round()

    def cost(step, origin):
        codes = ((X / step).round() + origin).clamp(grid.low, grid.high)
        return (((codes - origin) * step - X).square() * weights.view(X.shape[1], -1)).sum()

    zeros = 0 if zero is None else zero[..., None].double()
    assert cost(step[..., None], zeros) <= cost(whole, origin) + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 3, 4]),
    st.booleans(),
    st.sampled_from([torch.float64, torch.bfloat16]),
    st.booleans(),
    st.sampled_from([(False, 1, 0.5), (True, 1.1, 0.6)]),
    st.integers(0, 2**31),
)
def test_ranges_are_the_best_of_those_that_are_tried(bits, symmetric, dtype, signed, tried, seed):
    """Sixteen steps from whole down to a half, or from wider to narrower ones where errors are fed on."""
    grid, (fed, *ends) = Grid(bits, 32, symmetric), tried
    W, weights = normal(6, 64, seed=seed), normal(64, seed=seed + 1).exp()
    W[:, ::32] = 4.0
    X, w = W.view(6, 2, 32), weights.view(2, 32)
    low, high = X.amin(-1).clamp_max(0), X.amax(-1).clamp_min(0)
    if symmetric:
        low, high = -torch.maximum(-low, high), torch.maximum(-low, high)

    def cost(step, origin):
        codes = ((X / step[..., None]).round() + origin[..., None]).clamp(grid.low, grid.high)
        return (((codes - origin[..., None]) * step[..., None] - X).square() * w).sum(-1)

    costs = []
    signs = (1, -1) if signed and symmetric else (1,)
    for shrink, sign in itertools.product(torch.linspace(*ends, 16).double(), signs):
        step = sign * (shrink * (high - low) / (2**bits - 1)).to(dtype).double()
        origin = 0 * step if symmetric else (grid.low - low * shrink / step).round().clamp(grid.low, grid.high)
        costs.append(cost(step, origin))
    step, zero = scales(W, grid, weights, dtype, signed=signed, fed=fed)
    assert step.dtype == dtype
    assert bool((step > 0).all()) == (not signed or not symmetric)
    found = cost(step.double(), torch.zeros_like(step) if zero is None else zero.double())
    torch.testing.assert_close(found, torch.stack(costs).amin(0), rtol=1e-4, atol=0)
    assert bits > 2 or fed or (found < costs[0]).any()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.integers(0, 2**31))
def test_a_scale_turns_the_longer_side_to_the_longer_values(bits, seed):
    """Weights on a grid that lies the other way round come back, and no positive scale does as well."""
    grid = Grid(bits, 32)
    codes = torch.randint(grid.low, grid.high + 1, (5, 64), generator=torch.Generator().manual_seed(seed)).double()
    codes[:, ::32] = grid.low
    reach = 2 ** (bits - 1)
    turned = -codes * 0.75 * 0.5 * (2**bits - 1) / reach  # the whole range is then one of those that are tried
    found, positive = (quantize(turned, grid, signed=signed) for signed in (True, False))
    errors = [float((turned - x.dense()).norm()) for x in (found, positive)]
    assert bool((found.scale < 0).all())
    assert bool((positive.scale > 0).all())
    assert errors[0] < errors[1]


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(1, 40), st.sampled_from([32, 64, 96]), st.sampled_from([torch.bfloat16, torch.float32]))
def test_bytes_are_those_of_the_tensors(grid, out, size, dtype):
    layer = PackedLinear(size, out, grid, bias=False, dtype=dtype)
    assert grid.nbytes(out, size, dtype.itemsize) == sum(tensor.nbytes for tensor in layer.buffers())


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(-30, 30), st.integers(-30, 30), st.sampled_from([(1, 32), (5, 64)]), st.integers(0, 2**31))
def test_the_unit_of_weights_and_metrics_changes_no_code(grid, power, metric_power, shape, seed):
    W, weights = normal(*shape, seed=seed), normal(shape[1], seed=seed + 1).exp()
    plain = quantize(W, grid, weights)
    scaled = quantize(W * 2.0 ** (3 * power), grid, weights * 2.0 ** (3 * metric_power))
    assert torch.equal(scaled.codes, plain.codes)
    assert torch.equal(scaled.scale, plain.scale * 2.0 ** (3 * power))


def test_weights_beyond_the_dtype_of_the_scales_are_named():
    W = normal(4, 32)
    W[2] *= 1e9
    assert quantize(W, Grid(4, None), dtype=torch.bfloat16).dense().isfinite().all()
    with pytest.raises(NumericalError, match=r"need scales beyond torch\.float16; load the model in bfloat16"):
        quantize(W, Grid(4, None), dtype=torch.float16)
    lost = expected(W, Grid(4, None), torch.ones(32).double(), torch.ones(4).double(), torch.float16)
    assert lost.isfinite().all()
    assert float(lost[2].sum()) > 0.1 * float(W[2].square().sum())  # an option that nobody takes


@pytest.mark.parametrize(
    ("size", "wanted", "group"), [(576, 128, None), (1536, 128, 128), (96, 32, 32), (64, None, None)]
)
def test_groups_divide_the_inputs(size, wanted, group):
    assert fitting_group(size, wanted) == group
