"""The re-fit of one factor, which is least squares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.matrices import metric, normal
from spectrim.maths.closed_form import gram, refit
from spectrim.maths.rounding import error


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**31), st.sampled_from(["full", "thin", "diagonal", "none"]))
def test_a_refit_is_least_squares_and_never_raises_the_error(k, seed, kind):
    W, A, B = normal(12, 16, seed=seed), normal(12, k, seed=seed + 1), normal(k, 16, seed=seed + 2)
    X = normal(5 if kind == "thin" else 40, 16, seed=seed + 3)
    C = {"none": None, "diagonal": X.square().sum(0)}.get(kind, X.T @ X)
    found = refit(W, A, B, C)
    for M in (None, metric(12, seed=seed + 4)):
        assert error(W - found @ B, C, M) <= error(W - A @ B, C, M) * (1 + 1e-9) + 1e-9
    # Orthogonal to all that A can reach.
    dense = torch.eye(16).double() if C is None else C.diag() if C.ndim == 1 else C
    assert float(((W - found @ B) @ dense @ B.T).abs().max()) == pytest.approx(
        0, abs=1e-6 * float((W @ dense @ B.T).abs().max())
    )
    torch.testing.assert_close(gram(B, C), B @ dense @ B.T)
