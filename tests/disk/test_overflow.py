"""Tensors that leave memory while their owner rests, and come back bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrim.compensate.streams import Pass, stopping_at
from spectrim.disk.overflow import Overflow
from spectrim.errors import StatisticsError

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def drawn(sizes: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    each = [torch.randint(-99, 99, (n, 3), generator=generator) for n in sizes]
    return [x.to(DTYPES[(seed + i) % len(DTYPES)]) for i, x in enumerate(each)]


@given(
    owners=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5),
    turns=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12),
    room=st.integers(0, 400),
    seed=st.integers(0, 9),
)
def test_bytes_come_back_whatever_rests_and_wakes(owners, turns, room, seed, tmp_path_factory):
    held = [drawn(sizes, seed + i) for i, sizes in enumerate(owners)]
    before = [[x.clone() for x in some] for some in held]
    with Overflow(room, tmp_path_factory.getbasetemp()) as overflow:
        for number, some in enumerate(held):
            overflow.rest(number, some)
            inside = [x.untyped_storage().nbytes() for other in held[: number + 1] for x in other]
            assert sum(inside) <= room
        for turn, (number, changes) in enumerate(turns):
            number %= len(held)
            if changes:
                overflow.wake(number)
                for i, x in enumerate(held[number]):
                    assert torch.equal(x, before[number][i])
                    x.fill_(turn)
                    before[number][i].fill_(turn)
                overflow.rest(number, held[number])
            else:
                with overflow.awake(number):
                    assert all(map(torch.equal, held[number], before[number]))
        for number, some in enumerate(held):
            overflow.wake(number)
            assert all(map(torch.equal, some, before[number]))


def test_views_of_one_storage_and_what_others_read(tmp_path):
    x = torch.arange(12.0).view(3, 4)
    view, shared, small = x.T, torch.arange(4.0), torch.arange(100.0)[:3]
    seen = x.clone().numpy()
    looked_at = torch.from_numpy(seen)
    with Overflow(0, tmp_path) as overflow:
        overflow.leave([shared[:2]])
        overflow.rest("a", [x, view, shared, small, looked_at])
        assert x.untyped_storage().nbytes() == 0
        assert overflow._shelf._file.seek(0, 2) == 12 * 4  # once
        assert torch.equal(shared, torch.arange(4.0))
        assert torch.equal(small, torch.arange(3.0))
        assert torch.equal(looked_at, torch.arange(12.0).view(3, 4))
        with overflow.awake("a"):
            assert torch.equal(view, torch.arange(12.0).view(3, 4).T)
        assert x.untyped_storage().nbytes() == 0
        version = x._version
        overflow.wake("a")
        overflow.wake("a")
        assert x._version == version  # nothing wrote into it, as hooks see it
        overflow.rest("b", [torch.ones(3, 4)])
        assert overflow._shelf._file.seek(0, 2) == 12 * 4  # its place is taken again
        overflow.forget("b")
    assert not list(tmp_path.iterdir())
    with Overflow(0, tmp_path / "none") as overflow, pytest.raises(StatisticsError, match="make room, or raise --memo"):
        overflow.rest("a", [x])


def test_a_suspended_pass_holds_nothing_of_its_stream(tmp_path):
    """What the model's own frame holds leaves memory, too, but not what is the model's or the batch's."""
    blocks = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(3)).requires_grad_(False)
    queries, given_in = torch.nn.Parameter(torch.ones(8, 64)), torch.ones(8, 64)
    frames: list[torch.Tensor] = []

    def forward(x: torch.Tensor, begin: torch.Tensor) -> torch.Tensor:
        states = [begin, x * 2]
        frames.append(states[1])
        hidden = blocks[0](begin) + blocks[1](states[1])
        states.append(hidden)
        frames.append(hidden)
        return blocks[2](hidden) + states[1]

    for begin in (queries, given_in):
        frames.clear()
        result: list[torch.Tensor] = []
        with (
            stopping_at({str(i): block for i, block in enumerate(blocks)}),
            Overflow(0, tmp_path) as overflow,
        ):
            overflow.leave([queries, given_in])
            one = Pass(lambda: result.append(forward(given_in, begin)), "cpu", overflow)  # noqa: B023
            one.start()
            held = []
            while one.unit is not None:
                held.append([x.untyped_storage().nbytes() for x in frames])
                assert torch.equal(begin, torch.ones(8, 64))
                call, block = one.wake(), blocks[int(one.unit)]
                one.answer(type(block).forward(block, *call.args))
            assert held == [[8 * 64 * 4], [0], [0, 0]]  # the first block reads what is others'
        assert torch.equal(result[0], forward(given_in, begin))
