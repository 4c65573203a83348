"""What one process of a server computes: all processes together must give what the layer gives."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressed import product, randomised
from helpers.exchanged import pack_linears
from spectrim.errors import CheckpointError
from spectrim.maths.decompose import Rank
from spectrim.maths.rounding import Grid
from spectrim.serve.shards import Piece, fused, members, row_shards, take
from spectrim.storage.layers import LowRankLinear

HEADS, SIZE = 4, 6
OUT, IN = HEADS * SIZE, 12
RANKS: dict[str, tuple[Rank, bool]] = {"whole": (5, False), "heads": ((1, 4, 2, 3), False), "pivoted": (7, True)}


def filled(rank: Rank, pivoted: bool, out: int = OUT) -> LowRankLinear:
    """Random factors in float64; the rows of the pivots are spread over the layer."""
    return randomised(LowRankLinear(IN, out, rank, bias=False, pivoted=pivoted, dtype=torch.float64))


def computed(piece: Piece, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What a process makes of x [tokens, in], in two products, as the plugin does."""
    inputs = x[:, piece.columns.start : piece.columns.stop]
    dense = piece.rank is None
    rows = piece.reads()["" if dense else "B"]
    weight = take(tensors["weight" if dense else "B.weight"], rows)
    latent = inputs @ weight[:, piece.columns.start : piece.columns.stop].mT
    assert latent.shape[1] == piece.latents
    if piece.rank is None:
        return latent
    if piece.pivoted:
        others, order = piece.unpivot(tensors["pivots"])
        return torch.cat([latent, latent @ tensors["A.weight"][others].mT], dim=1)[:, order]
    outputs = []
    for block in piece.blocks:
        A = tensors["A.weight" if isinstance(piece.rank, int) else f"A.{block.head}.weight"]
        outputs.append(latent[:, block.latent.start : block.latent.stop] @ take(A, block.rows).mT)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("form", RANKS)
@settings(max_examples=40, deadline=None)
@given(
    borders=st.sets(st.integers(1, OUT - 1), max_size=4),
    shuffled=st.randoms(),
    columns=st.tuples(st.integers(0, IN - 1), st.integers(1, IN)).filter(lambda c: c[0] < c[1]),
)
def test_any_rows_and_columns(form, borders, shuffled, columns):
    """Any ranges of rows in any order, at heads' borders or not, and any range of columns."""
    torch.manual_seed(0)
    layer = filled(*RANKS[form])
    rows = [range(a, b) for a, b in itertools.pairwise([0, *sorted(borders), OUT])]
    shuffled.shuffle(rows)
    rows = rows[: max(1, len(rows) - 1)]
    piece = Piece("x", *RANKS[form], (OUT, IN), tuple(rows), range(*columns))
    x = torch.randn(3, IN, dtype=torch.float64)
    wanted = x[:, slice(*columns)] @ take(product(layer).double(), rows)[:, slice(*columns)].mT
    torch.testing.assert_close(computed(piece, layer.state_dict(), x), wanted)


@pytest.mark.parametrize("form", RANKS)
@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_processes_together_are_the_layer(form, parallel):
    torch.manual_seed(1)
    rank, pivoted = RANKS[form]
    layer = filled(rank, pivoted)
    tensors, x = layer.state_dict(), torch.randn(3, IN, dtype=torch.float64)
    shards = [row_shards([OUT], [1], [OUT // parallel], index)[0] for index in range(parallel)]
    by_rows = [computed(Piece("x", rank, pivoted, (OUT, IN), rows, range(IN)), tensors, x) for rows in shards]
    torch.testing.assert_close(torch.cat(by_rows, dim=1), layer(x))
    width = IN // parallel
    by_columns = [
        computed(Piece("x", rank, pivoted, (OUT, IN), (range(OUT),), range(i * width, (i + 1) * width)), tensors, x)
        for i in range(parallel)
    ]
    torch.testing.assert_close(torch.stack(by_columns).sum(0), layer(x))


@pytest.mark.parametrize("form", RANKS)
def test_tensors_are_those_of_the_layer(form):
    layer = filled(*RANKS[form])
    piece = Piece("x", *RANKS[form], (OUT, IN), (range(OUT),), range(IN))
    assert piece.tensors() == {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    dense = Piece("x", None, False, (OUT, IN), (range(OUT),), range(IN))
    assert dense.tensors() == {"weight": (OUT, IN)}
    assert dense.latents == OUT


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tensors_of_integers_are_those_of_the_layer(bits, symmetric):
    grid, inputs = Grid(bits, 32, symmetric), 64
    for rank, parts in ((5, ["B", "R"]), (32, ["A", "B"]), ((1, 32, 2, 3), ["A.1", "B"]), (None, [""])):
        model = nn.Module()
        model.x = nn.Linear(inputs, OUT, bias=False)
        if rank is not None:
            model.x = LowRankLinear(inputs, OUT, rank, bias=False)
        pack_linears(model, {f"x.{part}".removesuffix("."): grid for part in parts})
        piece = Piece("x", rank, False, (OUT, inputs), (range(OUT),), range(inputs), dict.fromkeys(parts, grid))
        assert piece.tensors() == {name: tuple(tensor.shape) for name, tensor in model.x.state_dict().items()}


def test_integers_that_a_linear_cannot_have():
    def piece(rank: Rank | None, pivoted: bool, part: str) -> Piece:
        return Piece("x", rank, pivoted, (OUT, 64), (range(OUT),), range(64), {part: Grid(4, 32)})

    for rank, pivoted, part in ((None, False, "R"), (5, True, "B"), (5, False, ""), ((1, 2), False, "A.2")):
        with pytest.raises(CheckpointError, match=f"'x' cannot have integers as its part '{part}'"):
            piece(rank, pivoted, part)
    with pytest.raises(CheckpointError, match="'x', part 'A': groups of 32 do not divide 5 inputs"):
        piece(5, False, "A")


def test_rest_beside_factors_is_shared_like_a_dense_weight():
    """It reads all columns at hand, and gives the rows at hand in the order of the outputs."""
    grids = {"R": Grid(4, None)}
    piece = Piece("x", 3, False, (OUT, IN), (range(4, 8), range(2)), range(6), grids)
    assert piece.reads() == {"B": (range(3),), "R": (range(4, 8), range(2))}


def test_a_process_reads_no_more_than_its_heads():
    """Half of the heads need half of B, so per-head factors shrink with the number of processes."""
    piece = Piece("x", (1, 4, 2, 3), False, (OUT, IN), (range(2 * SIZE, OUT),), range(IN))
    assert piece.heads == (2, 3)
    assert piece.latents == 5
    assert [block.out for block in piece.blocks] == [SIZE, SIZE]


def test_linears_that_a_checkpoint_has_joined():
    """q, k and v in one linear: a process has a part of each, and shared key/value heads are repeated."""
    shards = [row_shards([8, 4, 4], [1, 2, 2], [2, 2, 2], index) for index in range(4)]
    assert fused([8, 4, 4], shards[0]) == (range(2), range(8, 10), range(12, 14))
    assert fused([8, 4, 4], shards[1]) == (range(2, 4), range(8, 10), range(12, 14))
    assert fused([8, 4, 4], shards[3]) == (range(6, 8), range(10, 12), range(14, 16))
    layer = filled(5, False, out=16)
    x = torch.randn(3, IN, dtype=torch.float64)
    for shard in shards:
        rows = fused([8, 4, 4], shard)
        piece = Piece("qkv", 5, False, (16, IN), rows, range(IN))
        assert len(piece.blocks) == 1  # one product, although the rows are apart
        wanted = x @ take(product(layer), rows).mT
        torch.testing.assert_close(computed(piece, layer.state_dict(), x), wanted)


def test_names_of_merged_linears():
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    assert members("a.0.qkv_proj", packed, {}) == ["a.0.q_proj", "a.0.k_proj", "a.0.v_proj"]
    assert members("qkv_proj", packed, {}) == ["q_proj", "k_proj", "v_proj"]
    assert members("a.0.o_proj", packed, {}) == ["a.0.o_proj"]
    # a linear that the checkpoint has joined under the same name as the server
    assert members("a.0.qkv_proj", packed, {"a.0.qkv_proj": 3}) == ["a.0.qkv_proj"]


def test_what_cannot_be_served():
    with pytest.raises(CheckpointError, match="'x' has 24 outputs and the ranks"):
        Piece("x", (1, 2, 3, 4, 5), False, (OUT, IN), (range(OUT),), range(IN))
    with pytest.raises(CheckpointError, match="'x' has 24 outputs"):
        Piece("x", OUT, True, (OUT, IN), (range(OUT),), range(IN))
    piece = Piece("x", 3, True, (OUT, IN), (range(OUT),), range(IN))
    with pytest.raises(CheckpointError, match=r"x\.pivots: pivots repeat a row"):
        piece.unpivot(torch.tensor([1, 1, 2]))
    with pytest.raises(CheckpointError, match="another tensor-parallel size"):
        row_shards([8], [1], [3], 2)
