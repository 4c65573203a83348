"""Pivoted factors: exactness, bounded coefficients, rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.matrices import normal
from spectrim.errors import NumericalError
from spectrim.maths.pivots import BOUND, pivoted, row_order


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
