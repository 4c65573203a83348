"""Heads that are factored apart: each by itself, and the slices of all together."""

import pytest
import torch

from helpers.matrices import normal
from spectrim.maths.decompose import OutputMetric, Spectrum, decompose, factors, sides
from spectrim.maths.roots import BlockRoot


def output_metric(heads: int, size: int) -> OutputMetric:
    blocks = [normal(size + 3, size, seed=90 + h) for h in range(heads)]
    nats = torch.linspace(0.5, 3.0, heads, dtype=torch.float64)
    return OutputMetric(tuple(BlockRoot((X.T @ X)[None]) for X in blocks), nats)


def mine(found: Spectrum, head: int) -> torch.Tensor:
    return (found.head == head).nonzero()[:, 0]


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize(("heads", "size", "columns"), [(4, 3, 7), (2, 6, 4), (3, 1, 5)])
def test_heads_are_decomposed_by_themselves(heads, size, columns, curved):
    W, X = normal(heads * size, columns), normal(40, columns, seed=1)
    output = output_metric(heads, size) if curved else None
    found = decompose(W, X.T @ X, output, heads)
    each = min(size, columns)
    assert found.head.bincount().tolist() == [each] * heads
    for head in range(heads):
        part = None if output is None else OutputMetric(output.roots[head : head + 1], output.nats[head : head + 1])
        alone, chosen = decompose(W[head * size : (head + 1) * size], X.T @ X, part), mine(found, head)
        torch.testing.assert_close(found.s[chosen], alone.s)
        rows = W[head * size : (head + 1) * size]
        for k in range(1, each + 1):
            ours = sides(rows, found.P[:, chosen[:k]], None if found.Q is None else found.Q[:, chosen[:k]])
            theirs = sides(rows, alone.P[:, :k], None if alone.Q is None else alone.Q[:, :k])
            torch.testing.assert_close(ours[0] @ ours[1], theirs[0] @ theirs[1])
        if curved:
            torch.testing.assert_close(found.loss[chosen], alone.loss)
    # Each head's first direction comes first, then all others by what they cost.
    assert sorted(found.head[:heads].tolist()) == list(range(heads))
    cost = found.loss if curved else found.s
    assert (cost[heads:].diff() < 0).all()
    for head in range(heads):
        assert cost[:heads][found.head[:heads] == head] == cost[found.head == head].max()


@pytest.mark.parametrize("curved", [False, True])
def test_slices_of_all_heads_are_those_of_each(curved):
    """The first `count` directions, by head: the product of their factors is the approximation of every head."""
    heads, size, columns = 3, 4, 6
    W, X = normal(heads * size, columns), normal(40, columns, seed=1)
    found = decompose(W, X.T @ X, output_metric(heads, size) if curved else None, heads)
    assert found.heads == heads
    for count in range(heads, heads * size + 1):
        rank = found.rank(count)
        assert rank == tuple(int((found.head[:count] == head).sum()) for head in range(heads))
        s, P, Q = found.directions(rank)
        assert (len(s), tuple(P.shape), (Q is None) == (not curved)) == (count, (heads * size, count), True)
        A, B = factors(W, s, P, Q)
        columns_of = torch.arange(heads).repeat_interleave(torch.tensor(rank))
        for head, rows in enumerate(W.chunk(heads)):
            chosen = mine(found, head)[: rank[head]]
            assert torch.equal(s[columns_of == head], found.s[chosen])
            assert not A.chunk(heads)[head][:, columns_of != head].any()
            left, right = sides(rows, found.P[:, chosen], None if found.Q is None else found.Q[:, chosen])
            torch.testing.assert_close((A @ B).chunk(heads)[head], left @ right)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_slices_of_a_whole_matrix_are_its_first_directions(shape):
    W = normal(*shape)
    found = decompose(W, normal(40, shape[1], seed=1).square().sum(0))
    assert (found.heads, found.rank(3)) == (1, 3)
    s, P, Q = found.directions(3)
    assert torch.equal(s, found.s[:3])
    assert torch.equal(P, found.P[:, :3])
    assert Q is None if found.Q is None else torch.equal(Q, found.Q[:, :3])
