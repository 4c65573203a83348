"""Factored linears in vLLM: the linear method that loads and runs them.

vLLM keeps one module for linears that read one input. Its loader renames the tensors of the parts to those of the
module and says whose they are: ``q_proj.B.weight`` becomes ``qkv_proj.B.weight`` of shard ``q``. A factored module
therefore has one slot for each name that a part may bring, and its slots put what arrives where it is computed.

The product runs in two steps. ``first`` joins B of every factored part and the rows of every dense part, so that the
input is read once; ``second`` has A of every part or head. Integers stay packed where `packed` has a matrix for them,
and ``first`` then has one for each grid; else they are unpacked as soon as all tensors of a matrix have arrived. So
are linears of forms that are neither factors nor integers.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from spectrim.checkpoint.names import shortened
from spectrim.errors import CheckpointError, ModelError
from spectrim.maths.rounding import Grid
from spectrim.serve.experts import add_slot
from spectrim.serve.matrices import Matrix, OwnMatrix, PackedMatrix, packed
from spectrim.serve.served import Served, check_shape
from spectrim.serve.shards import Piece, fused, row_shards
from spectrim.storage import StoredLayer
from spectrim.storage.narrow import Narrow, check_units, width
from spectrim.storage.packed import PackedLinear

AnyMatrix = Matrix | PackedMatrix | OwnMatrix

_KINDS = (ReplicatedLinear, RowParallelLinear, ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear)
_SHARDS = {"q": 0, "k": 1, "v": 2}
_WORDS = ("weight_packed", "weight_zero_point", "pivots", "units")
_DTYPES = {**dict.fromkeys(_WORDS, torch.int32), "weight_shape": torch.int64}  # of tensors that are no floats


@contextmanager
def _fitting(name: str) -> Iterator[None]:
    """Say which part of the checkpoint has impossible values."""
    try:
        yield
    except ModelError as error:
        raise CheckpointError(
            f"the checkpoint's {name} does not fit the linear ({error}); copy or compress it again"
        ) from error


class Target(NamedTuple):
    """Where rows and columns of a matrix of the checkpoint go: one below the other in `matrix`, from `start` on."""

    matrix: AnyMatrix
    start: int
    rows: tuple[range, ...]
    columns: range


class Span(NamedTuple):
    """Outputs `start` to `stop` of the matrix of the first product with this number."""

    number: int
    start: int
    stop: int


class FactoredLinearMethod(LinearMethodBase):
    """Loads and runs the vLLM linear `prefix`, at least one of whose parts `names` is factored, or integers."""

    def __init__(self, names: list[str], served: Served, prefix: str) -> None:
        super().__init__()
        self.names, self.served, self.prefix = names, served, prefix
        self.dtype = torch.float32  # of inputs and outputs
        self.pads = False  # whether some outputs are zero
        self.reduces = False  # whether the sum over processes is taken here, of what the first product gives
        self.pieces: list[Piece] = []
        self.missing: set[tuple[int, str]] = set()  # tensors by piece and name
        self.pivots: dict[int, torch.Tensor] = {}  # of the piece with this number
        self.units: dict[int, torch.Tensor] = {}  # likewise, of one that has some of its inputs or outputs
        self.held: dict[tuple[int, str], PackedLinear] = {}  # integers of which some have arrived, by piece and part
        self.others: dict[int, StoredLayer] = {}  # linears of other forms of which some tensors have arrived, by piece
        self.targets: dict[tuple[int, str], list[Target]] = {}  # by piece and part
        # Of each piece: outputs of the first product, with the matrix that reads them, if any; and what is added.
        self.steps: list[tuple[list[tuple[Span, int | None]], Span | None]] = []

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Room for what this process computes, and the slots that the loader fills."""
        self.pieces = self._pieces(layer, input_size, input_size_per_partition, output_partition_sizes)
        self.dtype = params_dtype
        self.missing = {(i, name) for i, piece in enumerate(self.pieces) for name in piece.tensors()}
        first, spans = self._first(params_dtype)
        layer.first = nn.ModuleList(first)
        layer.second = nn.ModuleList()
        for i, piece in enumerate(self.pieces):
            read = spans[i, piece.first]
            steps: list[tuple[Span, int | None]] = []
            if piece.rank is None or piece.pivoted:
                steps.append((read, None))
            for block in piece.blocks:
                part = "A" if isinstance(piece.rank, int) else f"A.{block.head}"
                # Which rows of a pivoted A' are needed is known when the pivots are.
                rows = (range(piece.sizes()[part][0]),) if piece.pivoted else block.rows
                columns = range(len(block.latent))
                out, grid, where = sum(map(len, rows)), piece.grids.get(part), f"second.{len(layer.second)}"
                matrix = self._packed(out, columns, grid, params_dtype, where) or Matrix(
                    out, len(columns), params_dtype
                )
                self.targets.setdefault((i, part), []).append(Target(matrix, 0, rows, columns))
                latent = Span(read.number, read.start + block.latent.start, read.start + block.latent.stop)
                steps.append((latent, len(layer.second)))
                layer.second.append(matrix)
            self.steps.append((steps, spans.get((i, "R"))))
        self._count_unpacked(params_dtype.itemsize)
        # An adapter adds outputs of its own to those of the linear, which vLLM then has to sum.
        if isinstance(layer, RowParallelLinear) and get_current_vllm_config().lora_config is None:
            self.reduces = layer.reduce_results and any(piece.reduces for piece in self.pieces)
            layer.reduce_results = layer.reduce_results and not self.reduces
        names = {"weight"}.union(*(piece.tensors() for piece in self.pieces))
        others = [piece.stored(device="meta", dtype=params_dtype) for piece in self.pieces if piece.other is not None]
        dtypes = {name: tensor.dtype for layer in others for name, tensor in layer.state_dict().items()}
        for name in sorted(names):
            dtype = dtypes.get(name) or _DTYPES.get(name.rpartition(".")[2], params_dtype)
            add_slot(layer, name, dtype, partial(self._load, layer, name))

    def _first(self, dtype: torch.dtype) -> tuple[list[AnyMatrix], dict[tuple[int, str], Span]]:
        """The matrices of the first product, one for floats, one for each grid that stays; who has which rows."""
        parts = [(i, part, rows) for i, piece in enumerate(self.pieces) for part, rows in piece.reads().items()]
        columns = self.pieces[0].columns
        counts: Counter[Grid | None] = Counter()
        for i, part, rows in parts:
            counts[self.pieces[i].grids.get(part)] += sum(map(len, rows))
        made: dict[Grid | None, AnyMatrix] = {}
        for grid, count in counts.items():
            if (matrix := self._packed(count, columns, grid, dtype, f"first.{len(made)}")) is not None:
                made[grid] = matrix
        if floats := sum(count for grid, count in counts.items() if grid not in made):
            made[None] = Matrix(floats, len(columns), dtype)
        numbers, sizes = {grid: n for n, grid in enumerate(made)}, Counter[int]()
        spans = {}
        for i, part, rows in parts:
            grid = self.pieces[i].grids.get(part)
            grid = grid if grid in made else None
            number = numbers[grid]
            start = sizes[number]
            sizes[number] += sum(map(len, rows))
            spans[i, part] = Span(number, start, sizes[number])
            self.targets[i, part] = [Target(made[grid], start, rows, columns)]
        return list(made.values()), spans

    def _packed(
        self, out: int, columns: range, grid: Grid | None, dtype: torch.dtype, where: str
    ) -> PackedMatrix | OwnMatrix | None:
        """An empty matrix for these columns of a weight in which its integers stay packed, if that can be."""
        if grid is None:
            return None
        return packed(out, columns, grid, dtype, self.served.runtime, f"{self.prefix}.{where}")

    def _count_unpacked(self, itemsize: int) -> None:
        """Note what the integers, and linears of other forms, cost that are in matrices of floats."""
        for piece in self.pieces:
            if piece.other is not None:
                stored = sum(math.prod(shape) for shape in piece.tensors().values())
                mine = piece.out * len(piece.columns) / math.prod(piece.shape)
                self.served.others[piece.name] += int((math.prod(piece.shape) - stored) * itemsize * mine)
        for (i, part), targets in self.targets.items():
            grid = self.pieces[i].grids.get(part)
            for matrix, _, rows, columns in targets:
                if grid is not None and isinstance(matrix, Matrix):
                    out, inputs = sum(map(len, rows)), len(columns)
                    cost = out * inputs * itemsize - grid.nbytes(out, inputs, itemsize)
                    self.served.unpacked[self.pieces[i].name] += cost

    def _pieces(self, layer: Any, inputs: int, local_inputs: int, sizes: list[int]) -> list[Piece]:
        # vLLM's own classes; a subclass that loads in a way of its own also shares its weights in another way.
        loaders = {kind.weight_loader for kind in _KINDS}
        if type(layer).weight_loader not in loaders:
            raise CheckpointError(
                f"{shortened(self.names)} is a {type(layer).__name__} in vLLM, which spectrim cannot serve factored; "
                "keep it dense"
            )
        index, tp = layer.tp_rank, layer.tp_size
        columns = range(inputs)
        counts = [1] * len(sizes)
        if isinstance(layer, QKVParallelLinear):
            heads, shared = layer.total_num_heads, layer.total_num_kv_heads
            wholes = [heads * layer.head_size, shared * layer.head_size, shared * layer.v_head_size]
            counts = [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas]
        elif isinstance(layer, ColumnParallelLinear):
            wholes = [size * tp for size in sizes]
        else:
            wholes = sizes
            if isinstance(layer, RowParallelLinear):
                columns = range(index * local_inputs, (index + 1) * local_inputs)
            index = 0
        shards = row_shards(wholes, counts, sizes, index)
        if len(self.names) == 1:  # in one piece in the checkpoint
            wholes, shards = [sum(wholes)], (fused(wholes, shards),)
        if len(self.names) != len(wholes):
            raise CheckpointError(
                f"vLLM merges {len(wholes)} linears into one that it says consists of {shortened(self.names)}; keep "
                "these dense"
            )
        triples = zip(self.names, wholes, shards, strict=True)
        return [self._piece(name, (whole, inputs), rows, columns) for name, whole, rows in triples]

    def _piece(self, name: str, shape: tuple[int, int], rows: tuple[range, ...], columns: range) -> Piece:
        served, other = self.served, None if self.served.runs(name) else self.served.layers.get(name)
        whole = (rows, columns) == ((range(shape[0]),), range(shape[1]))
        if other is not None and other[0] == Narrow.name and whole:
            with _fitting(name):
                side, count, grid = width(other[1], shape[1], shape[0])
            grids = {} if grid is None else {"N": grid}
            if side == "outputs":
                few = (count, shape[1])
                return Piece(name, None, False, few, (range(count),), columns, grids, narrow=(side, shape[0]))
            if len(self.names) == 1:  # all parts of a module read the same inputs
                few = (shape[0], count)
                return Piece(name, None, False, few, rows, range(count), grids, narrow=(side, shape[1]))
        rank, grids = served.ranks.get(name), served.grids.get(name, {})
        return Piece(name, rank, name in served.pivoted, shape, rows, columns, grids, other=other)

    def _load(self, layer: Any, name: str, slot: nn.Parameter, tensor: torch.Tensor, shard: Any = None) -> None:
        """Put the tensor `name` of a part where it is computed; vLLM calls this for every tensor of the module."""
        i = 0 if shard is None and len(self.pieces) == 1 else _SHARDS.get(shard, shard)
        if not isinstance(i, int):
            raise CheckpointError(f"vLLM loads {shortened(self.names)} joined as {shard!r}; keep these linears dense")
        piece = self.pieces[i]
        expected = piece.tensors().get(name)
        if name == "weight" and expected is None and not tensor.numel():
            return  # the guard against loaders that know no factors
        check_shape(f"{piece.name}.{name}", tensor, expected)
        self.missing.discard((i, name))
        part, _, kind = name.rpartition(".")
        found: torch.Tensor | PackedLinear = tensor
        if piece.other is not None:
            if i not in self.others:
                self.others[i] = piece.stored(device=slot.device, dtype=self.dtype)
            self.others[i].state_dict()[name].copy_(tensor)
            if any((i, name) in self.missing for name in piece.tensors()):
                return
            layer, part = self.others.pop(i), ""
            with _fitting(piece.name):
                layer.loaded()
            found = layer.product()
        elif name == "pivots":
            self.pivots[i] = tensor.to(slot.device)
            return
        elif piece.narrow is not None and name == "units":
            with _fitting(piece.name):
                check_units(tensor, piece.narrow[1], piece.narrow[0])
            self.units[i] = tensor.to(slot.device)
            return
        if part in piece.grids:
            if (i, part) not in self.held:
                self.held[i, part] = piece.packed(part, dtype=self.dtype, device=slot.device)
            found = self.held[i, part]
            getattr(found, kind).copy_(tensor)
            if any((i, f"{part}.{kind}".removeprefix(".")) in self.missing for kind in found.state_dict()):
                return
            with _fitting(f"{piece.name}.{part}".removesuffix(".")):
                self.held.pop((i, part)).loaded()
        for target in self.targets.get((i, part), ()):  # none where this process needs nothing of a head
            target.matrix.put(target.start, found, target.rows, target.columns)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all is there, put pivoted rows in order, and hand the matrices to the kernels.

        Raises CheckpointError if a tensor never arrived, and for pivots that are no different rows.
        """
        self.served.report()  # all linears are there by now
        if self.missing:
            missing = sorted(f"{self.pieces[i].name}.{name}" for i, name in self.missing)
            raise CheckpointError(f"the checkpoint lacks {shortened(missing)}; copy or compress it again")
        orders, start, read = list[torch.Tensor](), 0, None
        for i, piece in enumerate(self.pieces):
            places = torch.arange(piece.out, device=layer.weight.device)
            found = piece.out
            if piece.pivoted:
                others, places = piece.unpivot(self.pivots[i])
                (target,) = self.targets[i, "A"]
                assert isinstance(target.matrix, Matrix)
                target.matrix.weight.data = target.matrix.weight.data[others]
                found = piece.latents + len(others)
                if not len(others):
                    self.steps[i][0].pop()
            elif piece.narrow is not None:
                if piece.narrow[0] == "inputs":
                    read = self.units[i]
                else:
                    places = piece.widened(self.units[i])
            orders.append(torch.where(places < 0, places, places + start))
            start += found
        order = torch.cat(orders)
        self.pads = bool((order < 0).any())  # outputs that are not there are zero, a last one besides
        order[order < 0] = start
        changes = self.pads or not torch.equal(order, torch.arange(start, device=order.device))
        layer.register_buffer("order", order if changes else None, persistent=False)
        layer.register_buffer("read", read, persistent=False)
        for matrix in (*layer.first, *layer.second):
            matrix.prepare()
        for name in {name.partition(".")[0] for piece in self.pieces for name in piece.tensors()} - {"weight"}:
            delattr(layer, name)  # the slots; an empty `weight` stays, for code that asks it for its device
        self.pivots.clear()
        self.units.clear()
        self.targets.clear()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map x [..., inputs of this process] to the outputs of this process [..., out]."""
        if layer.read is not None:
            x = x.index_select(-1, layer.read)
        read = [matrix(x) for matrix in layer.first]
        if self.reduces:
            # Sums of latents are smaller than those of outputs. vLLM hands in the bias in one process alone.
            read = [tensor_model_parallel_all_reduce(y) for y in read]
            bias = None if layer.skip_bias_add else layer.bias

        def outputs(span: Span) -> torch.Tensor:
            return read[span.number][..., span.start : span.stop]

        parts: list[torch.Tensor] = []
        for steps, rest in self.steps:
            made = [outputs(span) if j is None else layer.second[j](outputs(span).contiguous()) for span, j in steps]
            parts += made if rest is None else [torch.cat(made, dim=-1) + outputs(rest)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if layer.order is not None:
            y = (nn.functional.pad(y, (0, 1)) if self.pads else y).index_select(-1, layer.order)
        return y if bias is None else y + bias
