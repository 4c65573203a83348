"""Roots of output metrics: what they apply, against a matrix L that is written out, and the Nyström approximation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvatures import matrix
from helpers.matrices import close, normal
from spectrim.errors import NumericalError
from spectrim.maths.decompose import OutputMetric, decompose, sides
from spectrim.maths.roots import BlockRoot, LowRankRoot, OutputRoot, nystrom, wide


@st.composite
def roots(draw: st.DrawFn) -> tuple[OutputRoot, torch.Tensor]:
    """A root, and the metric G that it is of."""
    seed = draw(st.integers(0, 2**32 - 1))
    if draw(st.booleans()):
        count, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
        X = normal(count, size + 2, size, seed=seed)
        blocks = (X.mT @ X + 0.1 * torch.eye(size)) * 10.0 ** draw(st.integers(-3, 3))
        return BlockRoot(blocks), torch.block_diag(*blocks)
    out, rank = draw(st.integers(1, 9)), draw(st.integers(0, 12))
    d = (normal(out, seed=seed).square() + 0.1) * 10.0 ** draw(st.integers(-3, 3))
    V = normal(out, rank, seed=seed + 1)
    V[:, draw(st.integers(0, rank)) :] = 0
    return LowRankRoot(d, V), d.diag() + V @ V.T


@settings(max_examples=150, deadline=None)
@given(roots(), st.integers(1, 5))
def test_laws_of_roots(made, columns):
    root, G = made
    L, X = matrix(root, len(G)), normal(len(G), columns, seed=3)
    close(L.T @ L, G)
    close(root.times(X), L @ X)
    close(root.transposed_times(X), L.T @ X)
    close(root.solve(root.times(X)), X, 1e-7)
    close(root.times(root.solve(X)), X, 1e-7)


@settings(max_examples=60, deadline=None)
@given(roots(), st.integers(1, 9), st.integers(0, 2**31))
def test_the_spectrum_depends_on_the_metric_alone(made, size, seed):
    """Any other root of G gives the same values, and the same projections of the weight where values differ."""
    root, G = made
    W, X = normal(len(G), size, seed=seed), normal(30, size, seed=seed + 1)
    values, vectors = torch.linalg.eigh(G)
    symmetric = vectors @ (values.sqrt()[:, None] * vectors.T)
    U, sigma, _ = torch.linalg.svd(symmetric @ W @ torch.linalg.cholesky(X.T @ X + 1e-9 * torch.eye(size)))
    found = decompose(W, X.T @ X + 1e-9 * torch.eye(size), OutputMetric((root,), torch.tensor([2.0]).double()))
    close(found.s.sqrt(), sigma, 1e-6)
    close(found.loss, 2 * found.s)
    close(found.Q.T @ found.P, torch.eye(len(found.s), dtype=torch.float64), 1e-7)
    for k in range(1, len(sigma)):
        if sigma[k - 1] > 1.01 * sigma[k]:
            expected = torch.linalg.solve(symmetric, U[:, :k] @ (U[:, :k].T @ (symmetric @ W)))
            left, right = sides(W, found.P[:, :k], found.Q[:, :k])
            close(left @ right, expected, 1e-5)


def test_a_metric_that_is_not_positive_definite_is_refused():
    for blocks in (torch.zeros(2, 3, 3), -torch.eye(3)[None], torch.full((1, 2, 2), torch.nan)):
        with pytest.raises(NumericalError, match=r"raise metric\.damping"):
            BlockRoot(blocks.double()).times(torch.ones(blocks.shape[0] * blocks.shape[1], 1).double())
    good = torch.eye(3).double()
    with pytest.raises(NumericalError, match=r"raise metric\.damping"):
        BlockRoot(torch.stack([good, torch.ones(3, 3).double() - good])).solve(torch.ones(6, 1).double())
    for d in (torch.tensor([1.0, 0.0]), torch.tensor([1.0, -1.0]), torch.tensor([1.0, torch.nan])):
        with pytest.raises(NumericalError, match=r"raise metric\.damping"):
            LowRankRoot(d.double(), torch.ones(2, 1).double()).times(torch.ones(2, 1).double())


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 10), st.integers(0, 10), st.integers(1, 12), st.integers(0, 2**31), st.integers(-6, 6))
def test_nystrom(out, rank, size, seed, exponent):
    """Positive semidefinite, never more than G, no worse where the sketch is wider, and G itself from G's rank on."""
    X = normal(out, rank, seed=seed) * 10.0**exponent
    G, test = X @ X.T, normal(out, size, seed=seed + 1)
    V = nystrom(G @ test, test)
    scale = float(G.trace())
    assert len(V) == out
    assert torch.linalg.eigvalsh(G - V @ V.T).min() >= -1e-6 * scale
    if size >= min(rank, out) + 3:  # with fewer, a random sketch may be ill-conditioned
        torch.testing.assert_close(V @ V.T, G, rtol=0, atol=1e-5 * scale)


def test_nystrom_of_nothing():
    V = nystrom(torch.zeros(5, 3, dtype=torch.float64), normal(5, 3))
    assert not (V @ V.T).any()
    root = LowRankRoot(torch.full((5,), 4.0, dtype=torch.float64), V)
    close(matrix(root, 5), 2 * torch.eye(5, dtype=torch.float64))


def test_nystrom_of_sums_in_float32():
    """Rounding leaves eigenvalues of the core where G has none; dividing by them would blow it up."""
    worst = 0.0
    for seed in range(300):
        X, test = normal(12, 3, seed=seed), normal(12, 8, seed=seed + 1000)
        V = nystrom((X.float() @ (X.float().T @ test.float())).double(), test)
        worst = max(worst, float((V @ V.T - X @ X.T).abs().max() / X.square().sum()))
    assert worst < 3e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_products_are_formed_in_32_bits_at_least(dtype):
    assert wide(torch.ones(2, dtype=dtype)).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
