"""Factored linears in vLLM: its quantization config, and the linear method that loads and runs them.

vLLM keeps one module for linears that read one input. Its loader renames the tensors of the parts to those of the
module and says whose they are: ``q_proj.B.weight`` becomes ``qkv_proj.B.weight`` of shard ``q``. A factored module
therefore has one slot for each name that a part may bring, and its slots put what arrives where it is computed.

The product runs in two steps. ``first`` joins B of every factored part and the rows of every dense part, so that the
input is read once; ``second`` has A of every part or head. Both use vLLM's own unquantised kernels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from spectrim.checkpoint.names import shortened
from spectrim.checkpoint.quantizer import METHOD, SpectrimConfig
from spectrim.errors import CheckpointError
from spectrim.layers import Rank
from spectrim.serve.shards import Piece, fused, members, row_shards, take

_KINDS = (ReplicatedLinear, RowParallelLinear, ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear)
_SHARDS = {"q": 0, "k": 1, "v": 2}


class FactoredConfig(QuantizationConfig):
    """vLLM's view of ``quantization_config`` of a checkpoint; `ranks` and `pivoted` are keyed by vLLM's names.

    Raises CheckpointError for integers, which are not served yet.
    """

    def __init__(self, config: SpectrimConfig) -> None:
        super().__init__()
        if config.inner is not None:
            raise CheckpointError(
                "the checkpoint holds integers, which spectrim does not serve in vLLM yet; "
                "compress without quantize.bits"
            )
        self.ranks: dict[str, Rank] = dict(config.ranks)
        self.pivoted = set(config.pivoted)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FactoredConfig":
        """From the dict in config.json; CheckpointError for one that this spectrim cannot read."""
        return cls(SpectrimConfig(**config))

    def get_name(self) -> str:
        """``quant_method`` of the checkpoints."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Factors are ordinary floats."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """No kernel of ours: any GPU will do."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """All is in config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the linears as the model's loader renames their tensors; models call this while they are built."""

        def renamed(name: str) -> str:
            return str(hf_to_vllm_mapper.map_name(f"{name}.weight")).removesuffix(".weight")

        self.ranks = {renamed(name): rank for name, rank in self.ranks.items()}
        self.pivoted = {renamed(name) for name in self.pivoted}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """A FactoredLinearMethod for linears with a factored part, vLLM's own method for all others."""
        if isinstance(layer, LinearBase):
            names = members(prefix, self.packed_modules_mapping, self.ranks)
            if any(name in self.ranks for name in names):
                return FactoredLinearMethod(names, self)
            return UnquantizedLinearMethod()
        if prefix in self.ranks:
            raise CheckpointError(f"vLLM has no linear {prefix!r} but a {type(layer).__name__}; keep it dense")
        return None


class Matrix(nn.Module):
    """A weight [out, in] that vLLM's unquantised method can prepare and apply; its values are undefined at first."""

    def __init__(self, out: int, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, inputs, dtype=dtype), requires_grad=False)


class FactoredLinearMethod(LinearMethodBase):
    """Loads and runs one vLLM linear, at least one of whose parts `names` is factored."""

    def __init__(self, names: list[str], config: FactoredConfig) -> None:
        super().__init__()
        self.names, self.config = names, config
        self.dense = UnquantizedLinearMethod()
        self.pieces: list[Piece] = []
        self.pivots: dict[int, torch.Tensor] = {}  # of the piece with this number
        self.missing: set[tuple[int, str]] = set()  # tensors by piece and name
        self.steps: list[tuple[int, int, int | None]] = []  # latents from, to, and the matrix that reads them, if any

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
        self.missing = {(i, name) for i, piece in enumerate(self.pieces) for name in piece.tensors()}
        start = 0
        second: list[Matrix] = []
        for piece in self.pieces:
            if piece.rank is None or piece.pivoted:
                self.steps.append((start, start + piece.latents, None))
            for block in piece.blocks:
                latent = range(start + block.latent.start, start + block.latent.stop)
                self.steps.append((latent.start, latent.stop, len(second)))
                # Which rows of a pivoted A' are needed is known when the pivots are.
                out = piece.shape[0] - len(block.latent) if piece.pivoted else block.out
                second.append(Matrix(out, len(block.latent), params_dtype))
            start += piece.latents
        layer.first = Matrix(start, input_size_per_partition, params_dtype)
        layer.second = nn.ModuleList(second)
        names = {"weight"}.union(*(piece.tensors() for piece in self.pieces))
        for name in sorted(names):
            *path, last = name.split(".")
            module = layer
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            slot = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            slot.weight_loader = partial(self._load, layer, name)  # type: ignore[attr-defined]
            module.register_parameter(last, slot)

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
        return [
            Piece(name, self.config.ranks.get(name), name in self.config.pivoted, (whole, inputs), rows, columns)
            for name, whole, rows in zip(self.names, wholes, shards, strict=True)
        ]

    def _load(self, layer: Any, name: str, slot: nn.Parameter, tensor: torch.Tensor, shard: Any = None) -> None:
        """Put the tensor `name` of a part where it is computed; vLLM calls this for every tensor of the module."""
        i = 0 if shard is None and len(self.pieces) == 1 else _SHARDS.get(shard, shard)
        if not isinstance(i, int):
            raise CheckpointError(f"vLLM loads {shortened(self.names)} joined as {shard!r}; keep these linears dense")
        piece = self.pieces[i]
        if name == "weight" and piece.rank is not None and not tensor.numel():
            return  # the guard against loaders that know no factors
        if (expected := piece.tensors().get(name)) != tuple(tensor.shape):
            raise CheckpointError(
                f"the checkpoint's {piece.name}.{name} has the shape {list(tensor.shape)} instead of "
                f"{None if expected is None else list(expected)}; copy or compress it again"
            )
        blocks_before = sum(len(other.blocks) for other in self.pieces[:i])
        if name == "pivots":
            self.pivots[i] = tensor.to(slot.device)
        elif name in ("weight", "B.weight"):
            start = sum(other.latents for other in self.pieces[:i])
            layer.first.weight.data[start : start + piece.latents].copy_(piece.first(tensor))
        else:
            head = int(name.split(".")[1]) if name.count(".") == 2 else 0
            for j, block in enumerate(piece.blocks, start=blocks_before):
                if block.head == head:
                    layer.second[j].weight.data.copy_(tensor if piece.pivoted else take(tensor, block.rows))
        self.missing.discard((i, name))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all is there, put pivoted rows in order, and hand the matrices to vLLM's kernels.

        Raises CheckpointError if a tensor never arrived, and for pivots that are no different rows.
        """
        if self.missing:
            missing = sorted(f"{self.pieces[i].name}.{name}" for i, name in self.missing)
            raise CheckpointError(f"the checkpoint lacks {shortened(missing)}; copy or compress it again")
        orders, start, j = [], 0, 0
        for i, piece in enumerate(self.pieces):
            order = torch.arange(piece.out, device=layer.first.weight.device)
            width = piece.out
            if piece.pivoted:
                others, order = piece.unpivot(self.pivots[i])
                layer.second[j].weight.data = layer.second[j].weight.data[others]
                width = piece.latents + len(others)
            orders.append(order + start)
            start += width
            j += len(piece.blocks)
        layer.register_buffer("order", torch.cat(orders) if self.pivots else None, persistent=False)
        self.steps = [step for step in self.steps if step[2] is None or len(layer.second[step[2]].weight)]
        for matrix in (layer.first, *layer.second):
            if len(matrix.weight):
                self.dense.process_weights_after_loading(matrix)
        for name in {name.partition(".")[0] for piece in self.pieces for name in piece.tensors()} - {"weight"}:
            delattr(layer, name)  # the slots; an empty `weight` stays, for code that asks it for its device
        self.pivots.clear()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map x [..., inputs of this process] to the outputs of this process [..., out]."""
        gemm: Callable[..., torch.Tensor] = self.dense.apply
        latent = gemm(layer.first, x)
        parts = []
        for start, stop, j in self.steps:
            part = latent[..., start:stop]
            parts.append(part if j is None else gemm(layer.second[j], part.contiguous()))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if layer.order is not None:
            y = y.index_select(-1, layer.order)
        return y if bias is None else y + bias
