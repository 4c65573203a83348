"""Sums of products: rows while they are few, then half of their sum; the same matrix either way."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrim.maths.sums import Gram, few_rows, gram_bytes, half_width, packed_bytes

CPU = torch.device("cpu")


def rows(count: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(st.integers(1, 12), st.lists(st.integers(0, 5), max_size=6), st.sampled_from([torch.float32, torch.float64]))
def test_a_gram_is_the_sum_of_products_however_it_is_kept(width, counts, dtype):
    gram, batches = Gram(width), [rows(n, width, dtype, seed) for seed, n in enumerate(counts)]
    for x in batches:
        gram.add(x, CPU)
    every = torch.cat([*batches, torch.zeros(0, width)]).double()
    assert (gram.rows is not None) == (sum(counts) <= few_rows(width))
    if gram.rows is not None:
        assert torch.equal(gram.rows.double(), every)
    expected, near = every.T @ every, {"rtol": 1e-5, "atol": 1e-5}
    X = rows(width, 3, torch.float64, seed=99)
    torch.testing.assert_close(gram.dense(), expected, **near)
    torch.testing.assert_close(gram.times(X), expected @ X, **near)
    assert gram.trace() == pytest.approx(float(expected.trace()), rel=1e-5)
    assert gram.nbytes <= max(8 * width**2, sum(counts) * width * dtype.itemsize)


def test_a_gram_from_a_file_goes_on_with_the_same_bits():
    batches = [rows(n, 40, seed=n) for n in (7, 9, 11, 13)]  # the third is one too many
    whole = Gram(40)
    for x in batches:
        whole.add(x, CPU)
    for stop in range(1, 4):
        first = Gram(40)
        for x in batches[:stop]:
            first.add(x, CPU)
        second = Gram(40, rows=first.rows) if first.slabs is None else Gram.of_half(first.half(torch.float64))
        for x in batches[stop:]:
            second.add(x, CPU)
        assert torch.equal(second.dense(), whole.dense())


def test_rows_are_copied():
    """The model may write into what a linear has read."""
    gram, x = Gram(8), torch.ones(2, 8)
    gram.add(x, CPU)
    x.zero_()
    assert torch.equal(gram.dense(), torch.full((8, 8), 2.0, dtype=torch.float64))


@given(st.integers(1, 9), st.sampled_from([1, 3, 512]))
def test_a_half_gives_the_symmetric_matrix_back(width, slab):
    square = rows(width, width, torch.float64)
    symmetric = square + square.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spectrim.maths.sums.SLAB", slab)
        half = Gram.of(symmetric).half(torch.float64)
        assert torch.equal(Gram.of_half(half).dense(), symmetric)
        assert torch.equal(Gram.of_half(half).diagonal(), symmetric.diagonal())
        single = Gram.of_half(Gram.of(symmetric).half(torch.float32)).dense()
        gram = Gram(width)
        gram.add(square, CPU)
        torch.testing.assert_close(Gram.of_half(gram.half(torch.float64)).dense(), square.T @ square)
    assert half_width(len(half)) == width
    assert half_width(len(half) + 1) is None or width == 1
    assert bool(((single - symmetric).abs() <= 6e-8 * symmetric.abs()).all())
    assert torch.equal(single, single.T)


@given(st.integers(2, 30), st.integers(0, 40))
def test_bytes_are_those_that_are_kept(width, count):
    gram = Gram(width)
    gram.add(rows(count, width), CPU)
    assert gram.nbytes <= gram_bytes(width, count, 4)
    if 2 * count <= few_rows(width):
        assert gram_bytes(width, count, 4) == gram.nbytes < 8 * width**2
    packed = gram.rows if gram.rows is not None else gram.half(torch.float32)
    assert packed.nbytes == packed_bytes(width, count, 4)
    assert packed_bytes(width, None, 4) == Gram.of(torch.eye(width).double()).half(torch.float32).nbytes
