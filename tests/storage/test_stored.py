"""One linear as it is stored: integer factors step by step, and what each of the steps is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectrim.storage.make import Stored, make_stored

from helpers.matrices import metric, normal
from spectrim.errors import NumericalError
from spectrim.linear import Linear
from spectrim.maths.decompose import OutputMetric, decompose, factors
from spectrim.maths.roots import BlockRoot
from spectrim.maths.rounding import Grid, Quantized, error, quantize
from spectrim.plan.plan import Integers, plan_row

LINEAR = Linear("a", "backbone", None, "up", 24, 32, None, torch.float32)


def problem(seed: int = 0, decay: float = 1.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, OutputMetric]:
    W, C, G = normal(24, 32, seed=seed), metric(32, seed + 1, decay), metric(24, seed + 2, decay)
    G = G + 0.01 * G.diagonal().mean() * torch.eye(24)
    return W, C, G, OutputMetric((BlockRoot(G[None]),), torch.tensor([0.5]).double())


def integers(bits: int | None = None, residual: int | None = None) -> Integers:
    return Integers(bits=bits, residual=residual, group=32)


@pytest.mark.parametrize("decay", [0.3, 1.5])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_second_factor_makes_up_for_the_rounding_of_the_first(bits, decay):
    """A is that of the exact B, or least squares to the rounded one where that is better after its own rounding."""
    better = 0
    for seed in range(4):
        W, C, G, output = problem(seed, decay)
        stored = make_stored(W, LINEAR, plan_row(LINEAR, 8, integers=integers(bits)), C, output, damping=0.01)
        A, B = stored.parts["A"], stored.parts["B"]
        assert isinstance(A, Quantized)
        assert isinstance(B, Quantized)
        B, R = B.dense(), torch.linalg.cholesky(C)
        fitted = torch.linalg.lstsq((B @ R).T, (W @ R).T).solution.T
        options = {"dtype": torch.float32, "damping": 0.01}
        exact, fitted = (
            quantize(X, A.grid, B @ C @ B.T, 0.5 * G, **options) for X in (decompose(W, C, output).P[:, :8], fitted)
        )
        costs = [error(W - X.dense() @ B, C, G) for X in (exact, fitted)]
        better += costs[1] < costs[0]
        assert error(W - stored.weight(), C, G) == pytest.approx(min(costs), rel=1e-6)
    assert better == 4 if decay < 1 else better < 4


@pytest.mark.parametrize("output_metric", [False, True])
def test_factors_beside_integers_take_what_rounding_left(output_metric):
    W, C, G, output = problem()
    if not output_metric:
        G, output = None, None
    stored = make_stored(W, LINEAR, plan_row(LINEAR, 4, integers=integers(None, 3)), C, output, damping=0.01)
    R = stored.parts["R"]
    assert isinstance(R, Quantized)
    assert torch.equal(R.codes, quantize(W, R.grid, C, None if G is None else 0.5 * G, damping=0.01,
                                         dtype=torch.float32).codes)  # fmt: skip
    left, right = (torch.eye(n).double() if M is None else torch.linalg.cholesky(M) for M, n in ((G, 24), (C, 32)))
    sigma = torch.linalg.svdvals(left.T @ (W - R.dense()) @ right)
    assert error(W - stored.weight(), C, G) == pytest.approx(float(sigma[4:].square().sum()), rel=1e-5)


def test_rounding_to_nearest_looks_at_no_metric():
    W, C, _, output = problem()
    for row in (plan_row(LINEAR, None, integers=integers(4)), plan_row(LINEAR, 8, integers=integers(4))):
        stored = make_stored(W, LINEAR, row, C, output, damping=None)
        spectrum = decompose(W, C, output)
        wanted = {"": W, "A": spectrum.P[:, :8], "B": spectrum.Q[:, :8].T @ W}
        assert stored.parts.keys() == ({""} if row.rank is None else {"A", "B"})
        for part, found in stored.parts.items():
            assert isinstance(found, Quantized)
            assert torch.equal(found.codes, quantize(wanted[part], found.grid, dtype=torch.float32).codes)


@pytest.mark.parametrize("bits", [(4, None), (None, 3), (8, 2)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_tensors_bring_back_what_they_were_made_of(bits, symmetric):
    W, C, _, output = problem()
    how = Integers(bits=bits[0], residual=bits[1], group=32, symmetric=symmetric)
    stored = make_stored(W, LINEAR, plan_row(LINEAR, 4, integers=how), C, output)
    again = Stored.from_tensors(stored.tensors())
    assert again.parts.keys() == stored.parts.keys() == ({"A", "B", "R"} if bits[1] else {"A", "B"})
    assert torch.equal(again.weight(), stored.weight())
    for part, found in stored.parts.items():
        if isinstance(found, Quantized):
            assert again.parts[part].grid == found.grid == Grid(found.grid.bits, found.grid.group, symmetric)


def test_plain_factors_are_those_of_the_spectrum():
    W, C, _, output = problem()
    stored = make_stored(W, LINEAR, plan_row(LINEAR, 5), C, output)
    found = decompose(W, C, output)
    A, B = factors(W, found.s[:5], found.P[:, :5], found.Q[:, :5])
    torch.testing.assert_close(stored.weight(), A @ B, rtol=0, atol=1e-6)
    assert stored.factors is not None
    assert {part.dtype for part in stored.factors} == {torch.float32}


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from([(1, 1), (1, 32), (32, 1), (8, 32), (32, 8), (6, 6)]),
    st.sampled_from([-14, -8, 0, 8, 14]),
    st.sampled_from([-15, -8, 0, 8, 15]),
    st.sampled_from(["full", "thin", "zero", "none"]),
    st.sampled_from(["full", "zero", "rank 1"]),
    st.sampled_from([(8, None), (None, 4), (4, None), None]),
    st.booleans(),
)
def test_no_weight_and_no_metric_is_too_odd(shape, power, metric_power, samples, kind, bits, symmetric):
    """Vectors, zeros, low ranks, any scale: what is stored is finite, and no worse than nothing."""
    W = {
        "full": normal(*shape),
        "zero": torch.zeros(shape),
        "rank 1": normal(shape[0], 1) @ normal(1, shape[1], seed=2),
    }
    W = W[kind].double() * 10.0**power
    X = normal(2 if samples == "thin" else 40, shape[1], seed=1) * 10.0**metric_power * (samples != "zero")
    C = None if samples == "none" else X.T @ X
    linear = Linear("a", "backbone", None, "up", *shape, None, torch.float32)
    how = bits and Integers(bits=bits[0], residual=bits[1], group=32, symmetric=symmetric)
    for rank in (None, max(1, min(shape) // 2)):
        if rank is not None or (how is not None and how.residual is None):
            stored = make_stored(W, linear, plan_row(linear, rank, integers=how), C, None).weight()
            assert stored.isfinite().all()
            assert error(W - stored, C) <= error(W, C) * (1 + 1e-6)


def test_a_weight_that_is_not_finite_is_named():
    W, C, _, output = problem()
    W[3, 4] = torch.inf
    with pytest.raises(NumericalError, match=r"^a: its weight holds NaN"):
        make_stored(W, LINEAR, plan_row(LINEAR, 5), C, output)
