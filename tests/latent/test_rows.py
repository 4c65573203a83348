"""Rows against a plain tensor to which the same happens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.latent.rows import SPARE, Rows

STEPS = st.lists(st.tuples(st.sampled_from(["append", "last", "drop", "choose"]), st.integers(1, 300)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_tokens_come_and_go_at_both_ends(steps):
    rows, plain = Rows(), torch.empty(2, 0, 3)
    rows.append(torch.empty(2, 0, 3))
    for kind, count in steps:
        if kind == "append":
            new = torch.rand(2, count, 3)
            rows.append(new)
            plain = torch.cat([plain, new], dim=1)
        elif kind == "last":
            rows.keep_last(count)
            plain = plain[:, -count:]
        elif kind == "drop":
            rows.drop_last(count)
            plain = plain[:, : max(0, plain.shape[1] - count)]
        else:
            rows.choose(lambda x: x.flip(0))
            plain = plain.flip(0)
        assert torch.equal(rows.held, plain)
        assert len(rows) == plain.shape[1]
        assert rows.nbytes == plain.numel() * 4


def test_there_is_room_for_what_comes_next_and_not_for_what_went():
    rows = Rows()
    rows.append(torch.zeros(1, 5000, 2))
    place = rows.held.untyped_storage().data_ptr()
    for _ in range(SPARE):
        rows.append(torch.ones(1, 1, 2))
    assert rows.held.untyped_storage().data_ptr() == place
    rows.keep_last(10)
    assert rows.held.untyped_storage().nbytes() <= (10 + SPARE) * 8


def test_what_was_written_in_inference_mode_can_be_continued_outside():
    rows = Rows()
    with torch.inference_mode():
        rows.append(torch.ones(1, 2))
    rows.append(torch.zeros(1, 1))
    assert rows.held.tolist() == [[1, 1, 0]]


def test_one_row_becomes_many():
    rows = Rows()
    rows.append(torch.ones(1, 2, 2))
    rows.append(torch.zeros(3, 1, 2))
    rows.append(torch.full((1, 1, 2), 2.0))
    assert rows.held[..., 0].tolist() == [[1, 1, 0, 2]] * 3
