"""The projection of docs/methods.md, section 1: identities, and the textbook route as an independent computation."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.matrices import close, normal, ranked
from spectrim.errors import NumericalError
from spectrim.maths.decompose import OutputMetric, Spectrum, decompose, factors, sides
from spectrim.maths.roots import BlockRoot, check_finite, eigh_descending, root

SHAPES = [(5, 9), (9, 5), (7, 7), (1, 6), (6, 1)]


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def dual(found: Spectrum) -> torch.Tensor:
    """``QᵀP``, which is the identity, but for directions in which the weight has no energy."""
    return (found.P if found.Q is None else found.Q).T @ found.P


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] and samples [n, in]; weight and samples may be rank-deficient, scaled or zero."""
    out, size, n = (draw(st.integers(1, 9)) for _ in range(3))
    seed = draw(st.integers(0, 2**32 - 1))
    W = normal(out, size, seed=seed) * 10.0 ** draw(st.sampled_from([0, 0, -30, 30]))
    if draw(st.booleans()):
        W[draw(st.integers(0, out - 1)) :] = 0
    X = normal(n, size, seed=seed + 1) * 10.0 ** draw(st.sampled_from([0, -3, 3, -30, 30]))
    X[:, draw(st.integers(0, size)) :] = 0
    return W, X


def nearly_blind(out: int, seen: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of two rows [out, 4], and two samples that see one of its directions next to not at all."""
    W, X = normal(out, 4, seed=seed), normal(2, 4, seed=seed + 1)
    W[2:], X[:, seen:] = 0, 0
    return W, X


@settings(max_examples=150, deadline=None)
@example(nearly_blind(8, 4, 26752))
@example(nearly_blind(7, 2, 2851))
@given(problems())
def test_laws_of_the_projection(problem):
    W, X = problem
    C = X.T @ X
    found = decompose(W, C)
    size = min(W.shape)
    assert found.s.shape == (size,)
    assert found.P.shape == (size, size)
    sigma = torch.linalg.svdvals(W @ X.T)
    close(found.s, torch.cat([sigma, sigma.new_zeros(size)])[:size].square())
    assert (found.s >= 0).all()
    assert (found.s.diff() <= 0).all()
    live = dual(found).diagonal().round()
    close(dual(found), live.diag())
    assert int(live.sum()) == size or int(live.sum()) >= torch.linalg.matrix_rank(W)
    close(ranked(found, W, size), W)
    energy = (X @ W.T).square().sum()
    for k in range(1, size + 1):
        approximation = ranked(found, W, k)
        assert approximation.isfinite().all()
        left, right = sides(W, found.P[:, :k], None if found.Q is None else found.Q[:, :k])
        close(left @ right, approximation)
        error = (X @ (W - approximation).T).square().sum()
        torch.testing.assert_close(error, found.s[k:].sum(), rtol=1e-7, atol=1e-9 * float(energy))
    torch.testing.assert_close(energy, found.s.sum(), rtol=1e-9, atol=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_identity_metric_is_the_plain_svd(out, size, seed):
    W = normal(out, size, seed=seed)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    for metric in (None, torch.ones(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)):
        found = decompose(W, metric)
        close(found.s.sqrt(), sigma, 1e-7)
        for k in range(1, len(sigma) + 1):
            if k == len(sigma) or sigma[k - 1] > 1.001 * sigma[k]:
                close(ranked(found, W, k), U[:, :k] * sigma[:k] @ Vh[:k], 1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_change_of_basis_of_the_inputs_changes_nothing(shape):
    W, X, Q = normal(*shape), normal(40, shape[1], seed=1), orthogonal(shape[1], 2)
    found, turned = decompose(W, X.T @ X), decompose(W @ Q, Q.T @ (X.T @ X) @ Q)
    close(turned.s, found.s)
    for k in range(1, min(shape) + 1):
        close(ranked(turned, W @ Q, k) @ Q.T, ranked(found, W, k))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("samples", [3, 40])
def test_both_routes_agree(shape, samples):
    """A few zero rows or columns put the same problem on the other side of out = in."""
    out, size = shape
    W, X = normal(out, size), normal(samples, size, seed=1)
    tall = torch.cat([W, W.new_zeros(max(0, size - out) + 2, size)])
    wide = torch.cat([W, W.new_zeros(out, max(0, out - size) + 2)], dim=1)
    padded = torch.cat([X, X.new_zeros(samples, wide.shape[1] - size)], dim=1)
    down, across = decompose(tall, X.T @ X), decompose(wide, padded.T @ padded)
    seen = min(out, size, samples)
    close(down.s[:seen], across.s[:seen], 1e-6)
    for k in range(1, seen + 1):
        close(ranked(down, tall, k)[:out], ranked(across, wide, k)[:, :size], 1e-6)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_textbook_svd_llm_gives_the_same_product(shape):
    W, X = normal(*shape), normal(200, shape[1], seed=1)
    C = X.T @ X
    S = torch.linalg.cholesky(C)
    U, sigma, Vh = torch.linalg.svd(W @ S, full_matrices=False)
    found = decompose(W, C)
    torch.testing.assert_close(found.s.sqrt(), sigma, rtol=1e-8, atol=0)
    for k in range(1, len(sigma) + 1):
        textbook = U[:, :k] * sigma[:k] @ Vh[:k] @ torch.linalg.inv(S)
        torch.testing.assert_close(ranked(found, W, k), textbook, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_diagonal_metric_is_the_matrix_with_that_diagonal(shape):
    W, diagonal = normal(*shape), normal(shape[1], seed=1).square()
    diagonal[0] = 0
    short, long = decompose(W, diagonal), decompose(W, diagonal.diag())
    close(short.s, long.s)
    for k in range(1, int((short.s > 0).sum()) + 1):
        close(ranked(short, W, k), ranked(long, W, k))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", ["none", "zero diagonal", "zero matrix"])
def test_unseen_weight_is_kept_by_its_own_energy(shape, metric):
    """Under a zero metric nothing has an error, and what remains is the plain SVD."""
    W, size = normal(*shape), shape[1]
    value = {"none": None, "zero diagonal": W.new_zeros(size), "zero matrix": W.new_zeros(size, size)}[metric]
    found = decompose(W, value)
    plain, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    assert metric == "none" or not found.s.any()
    for k in range(1, min(shape) + 1):
        close(ranked(found, W, k), plain[:, :k] * sigma[:k] @ Vh[:k])


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 3)])
@pytest.mark.parametrize("metric", [None, "few samples"])
def test_zero_weight(shape, metric):
    X = normal(2, shape[1])
    found = decompose(torch.zeros(shape), None if metric is None else X.T @ X)
    assert not found.s.any()
    A, B = factors(torch.zeros(shape), found.s, found.P, found.Q)
    assert A.isfinite().all()
    assert B.isfinite().all()
    assert not (A @ B).any()


def test_unseen_directions_come_by_energy():
    """Three samples see three directions; the next ones take most of what is left of the weight."""
    for shape in [(6, 9), (9, 6)]:
        W, X = normal(*shape), normal(3, shape[1], seed=1)
        found = decompose(W, X.T @ X)
        assert int((found.s > 0).sum()) == 3
        left = W - ranked(found, W, 3)
        sigma = torch.linalg.svdvals(left)
        for k in range(3, 6):
            close((W - ranked(found, W, k)).square().sum(), sigma[k - 3 :].square().sum())


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_output_metric(shape):
    """‖L (W − Ŵ) R‖² = Σ_{i>k} s_i, and no other matrix of that rank does better."""
    out, size = shape
    W, X, g = normal(*shape), normal(50, size, seed=1), normal(50, out, seed=2)
    G = g.T @ g / 50 + 0.01 * torch.eye(out, dtype=torch.float64)
    found = decompose(W, X.T @ X, OutputMetric((BlockRoot(G[None]),), torch.tensor([0.5], dtype=torch.float64)))
    L = torch.linalg.cholesky(G).T
    sigma = torch.linalg.svdvals(L @ W @ X.T)
    close(dual(found), torch.eye(min(shape), dtype=torch.float64))
    close(found.loss, found.s / 2)
    for k in range(1, min(shape) + 1):
        A, B = factors(W, found.s[:k], found.P[:, :k], found.Q[:, :k])
        error = (L @ (W - A @ B) @ X.T).square().sum()
        torch.testing.assert_close(error, found.s[k:].sum(), rtol=1e-7, atol=1e-9 * float(found.s.sum()))
        torch.testing.assert_close(error, sigma[k:].square().sum(), rtol=1e-7, atol=1e-9 * float(found.s.sum()))
    close(A @ B, W, 1e-8)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_factors_split_the_values_evenly(shape):
    W, X = normal(*shape), normal(30, shape[1], seed=1)
    found = decompose(W, X.T @ X)
    A, B = factors(W, found.s, found.P, found.Q)
    close(A.square().sum(0), found.s.sqrt())
    close((X @ B.T).square().sum(0), found.s.sqrt())


def test_weights_of_low_precision_are_decomposed_in_float64():
    W = normal(6, 8).bfloat16()
    X = normal(30, 8, seed=1)
    close(decompose(W, X.T @ X).s, decompose(W.double(), X.T @ X).s, 0)


def test_eigenvalues_fall_and_none_is_negative():
    for seed in range(20):
        X = normal(3, 9, seed=seed)
        values, vectors = eigh_descending(X.T @ X)
        close(vectors * values @ vectors.T, X.T @ X)
        close(values[:3], torch.linalg.svdvals(X).square())
        assert (values >= 0).all()  # rounding makes some of the six zeros negative


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_root(rank):
    X = normal(rank, 6)
    R = root(X.T @ X)
    assert R.shape == (6, rank)
    close(R @ R.T, X.T @ X)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_named(value):
    with pytest.raises(NumericalError, match=r"^the weight of layer 3 holds NaN"):
        check_finite("the weight of layer 3", torch.tensor([1.0, value]))
    fine = torch.ones(2)
    assert check_finite("x", fine) is fine
