"""What one process of a server computes of a factored linear; pure arithmetic on names, rows and tensors.

Servers merge linears that read one input (q, k, v; gate, up) and share each of them among processes (tensor
parallelism): by rows, so that every process has some of the outputs, or by columns, so that the outputs of all
processes add up. Both work on the factors themselves. For rows, a process has those rows of A and all of B; for
columns, all of A and those columns of B, because A (B₁x₁ + B₂x₂) = A B x: the sum that processes take is of latents,
which are fewer than the outputs. Pivoted factors need no special case: the
outputs are ``[B'x; A'B'x]`` in another order, so a process drops the rows of A' that it does not need, keeps B', and
picks its own outputs. The rest R of a weight beside its factors is shared like a dense weight, and added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from spectrim.errors import CheckpointError, ModelError
from spectrim.maths.decompose import Rank, head_ranks
from spectrim.maths.pivots import row_order
from spectrim.maths.rounding import Grid
from spectrim.storage import Spec, form
from spectrim.storage.packed import PackedLinear


@dataclass(frozen=True)
class Block:
    """Some outputs of one head: rows `rows` of its A, which read the part `latent` of the piece's latents."""

    head: int
    rows: tuple[range, ...]
    latent: range

    @property
    def out(self) -> int:
        """How many outputs."""
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class Piece:
    """What one process computes of one linear of the checkpoint.

    `shape` [out, in] is that of the whole linear, `rank` None for a dense one. The process gives the outputs `rows`, in
    this order, and reads the inputs `columns`. `grids` are those of its integers by part: ``""`` for a dense weight, A,
    A.0, B, R or N. `narrow` is for a linear of which some ``inputs`` or ``outputs`` are there alone, whose weight N has
    the `shape`: the name of that side, and how many there would be; no other process has a share of it. `other` is a
    form that is none of these, and its spec: such a linear becomes a dense one. Raises CheckpointError for ranks,
    integers and specs that the linear cannot have.
    """

    name: str
    rank: Rank | None
    pivoted: bool
    shape: tuple[int, int]
    rows: tuple[range, ...]
    columns: range
    grids: Mapping[str, Grid] = field(default_factory=dict)
    narrow: tuple[str, int] | None = None
    other: tuple[str, Spec] | None = None
    heads: tuple[int, ...] = field(init=False)  # those whose rows are needed, in the order of their latents
    blocks: tuple[Block, ...] = field(init=False)  # in the order of the outputs; none for a dense linear

    def __post_init__(self) -> None:
        out = self.shape[0]
        ranks = (1,) if self.rank is None else head_ranks(self.rank)
        if out % len(ranks) or (self.pivoted and ranks[0] >= out):
            raise CheckpointError(
                f"{self.name!r} has {out} outputs and the ranks {self.rank}; copy the checkpoint's config.json again"
            )
        parts: list[tuple[int, list[range]]] = []
        for head, rows in _by_head(self.rows, out // len(ranks)):
            if parts and parts[-1][0] == head:
                parts[-1][1].append(rows)
            else:
                parts.append((head, [rows]))
        heads = tuple(dict.fromkeys(head for head, _ in parts))
        latents, start = {}, 0
        for head in heads:
            latents[head] = range(start, start + ranks[head])
            start += ranks[head]
        blocks = tuple(Block(head, tuple(rows), latents[head]) for head, rows in parts)
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "blocks", () if self.rank is None else blocks)
        for part in self.grids:
            self.packed(part, device="meta")

    @property
    def out(self) -> int:
        """How many outputs the process computes."""
        return sum(map(len, self.rows))

    @property
    def first(self) -> str:
        """The part that reads the inputs."""
        return "N" if self.narrow else "" if self.rank is None else "B"

    @property
    def latents(self) -> int:
        """How many rows the first product has: those of the dense weight, or of B for the heads at hand."""
        if self.rank is None:
            return self.out
        ranks = head_ranks(self.rank)
        return sum(ranks[head] for head in self.heads)

    @property
    def reduces(self) -> bool:
        """Whether processes that share the inputs do better to add up the first product than the outputs."""
        reads = sum(len(part) for rows in self.reads().values() for part in rows)
        return len(self.columns) < self.shape[1] and reads < self.out

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Size [out, in] of every matrix of the whole linear, by part."""
        out, inputs = self.shape
        if self.rank is None:
            return {self.first: self.shape}
        ranks = head_ranks(self.rank)
        k = sum(ranks)
        if isinstance(self.rank, int):
            sizes = {"A": (out - self.pivoted * k, k), "B": (k, inputs)}
        else:
            sizes = {f"A.{h}": (out // len(ranks), r) for h, r in enumerate(ranks)} | {"B": (k, inputs)}
        return sizes | ({"R": self.shape} if "R" in self.grids else {})

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that the checkpoint must bring, by its name behind that of the linear."""
        if self.other is not None:
            return {name: tuple(tensor.shape) for name, tensor in self.stored(device="meta").state_dict().items()}
        found: dict[str, tuple[int, ...]] = {"pivots": (self.sizes()["B"][0],)} if self.pivoted else {}
        if self.narrow is not None:
            found["units"] = (self.shape[self.narrow[0] == "inputs"],)
        for part, size in self.sizes().items():
            held = {"weight": size}
            if part in self.grids:
                layer = self.packed(part, device="meta")
                held = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
            found |= {f"{part}.{name}".removeprefix("."): shape for name, shape in held.items()}
        return found

    def stored(self, **like: Any) -> Any:
        """An empty layer of its `other` form; CheckpointError where there can be none."""
        assert self.other is not None
        kind, spec = self.other
        try:
            return form(kind).build(skip_init(nn.Linear, self.shape[1], self.shape[0], bias=False, **like), spec)
        except ModelError as error:
            raise CheckpointError(f"{self.name!r}: {error}; copy the checkpoint's config.json again") from error

    def packed(self, part: str, **like: Any) -> PackedLinear:
        """An empty layer for the integers of a part; CheckpointError where there can be none."""
        if self.pivoted or part not in self.sizes():
            raise CheckpointError(f"{self.name!r} cannot have integers as its part {part!r}; copy config.json again")
        out, inputs = self.sizes()[part]
        try:
            return PackedLinear(inputs, out, self.grids[part], bias=False, **like)
        except ModelError as error:
            raise CheckpointError(f"{self.name!r}, part {part!r}: {error}") from error

    def reads(self) -> dict[str, tuple[range, ...]]:
        """The parts that read the input, and those of their rows that the process needs, in the order of its outputs.

        A dense weight; or B, whose rows are the latents, and R, whose outputs are added.
        """
        if self.rank is None:
            return {self.first: self.rows}
        ranks = head_ranks(self.rank)
        rows = tuple(range(start := sum(ranks[:head]), start + ranks[head]) for head in self.heads)
        return {"B": rows} | ({"R": self.rows} if "R" in self.grids else {})

    def widened(self, units: torch.Tensor) -> torch.Tensor:
        """Where each of all outputs stands in those of N, −1 for those that are not there; int64."""
        assert self.narrow is not None
        places = torch.full((self.narrow[1],), -1, device=units.device)
        places[units.long()] = torch.arange(len(units), device=units.device)
        return places

    def unpivot(self, pivots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(others, order)``: the rows of A' that are needed, and where each output stands in [B'x; A'[others] B'x].

        `pivots` is [k] of any integer dtype; both results are int64, `order` [out]. Raises CheckpointError for pivots
        that are not different rows of the linear.
        """
        try:
            order = take(row_order(pivots, self.shape[0]).argsort(), self.rows)
        except ValueError as error:
            raise CheckpointError(f"{self.name}.pivots: {error}") from None
        k = len(pivots)
        free = order >= k
        others = order[free] - k
        order[free] = k + torch.arange(len(others), device=order.device)
        return others, order


def _by_head(rows: Sequence[range], size: int) -> list[tuple[int, range]]:
    """`rows` cut at multiples of `size`: the number of the head, and the rows inside it."""
    cut = []
    for part in rows:
        start = part.start
        while start < part.stop:
            head = start // size
            stop = min(part.stop, (head + 1) * size)
            cut.append((head, range(start - head * size, stop - head * size)))
            start = stop
    return cut


def take(tensor: torch.Tensor, rows: Sequence[range]) -> torch.Tensor:
    """The rows `rows` of a tensor, in this order; a view where they are one range."""
    parts = [tensor[part.start : part.stop] for part in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def members(prefix: str, packed: Mapping[str, Sequence[str]], known: Mapping[str, object]) -> list[str]:
    """Names of the linears that the server's module `prefix` merges; itself where the checkpoint has it in one piece.

    `packed` maps the last part of a merged module's name to those of its parts; `known` are the factored linears.
    """
    parent, _, last = prefix.rpartition(".")
    if prefix in known or last not in packed:
        return [prefix]
    return [f"{parent}.{part}" if parent else part for part in packed[last]]


def row_shards(
    wholes: Sequence[int], counts: Sequence[int], sizes: Sequence[int], index: int
) -> tuple[tuple[range, ...], ...]:
    """The rows of each merged part that process `index` computes.

    Part i has `wholes[i]` rows, of which every process has `sizes[i]`; `counts[i]` neighbouring processes have the same
    ones, as they do with fewer key/value heads than processes.
    """
    shards = []
    for whole, count, size in zip(wholes, counts, sizes, strict=True):
        start = index // count * size
        if start + size > whole:
            raise CheckpointError(f"{whole} rows cannot be shared by {size}; choose another tensor-parallel size")
        shards.append((range(start, start + size),))
    return tuple(shards)


def fused(wholes: Sequence[int], shards: Sequence[Sequence[range]]) -> tuple[range, ...]:
    """The rows of parts that the checkpoint has one below the other in one linear."""
    starts = [sum(wholes[:i]) for i in range(len(wholes))]
    return tuple(
        chain.from_iterable(
            (range(start + rows.start, start + rows.stop) for rows in part)
            for start, part in zip(starts, shards, strict=True)
        )
    )
