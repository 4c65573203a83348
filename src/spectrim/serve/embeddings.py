"""Embeddings and output heads of integers in vLLM, which has no kernel for them: they are unpacked when they arrive."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from spectrim.errors import CheckpointError, ModelError
from spectrim.maths.rounding import Grid
from spectrim.serve.served import check_shape
from spectrim.storage.packed import PackedLinear


def embedding_method(
    layer: Any,
    prefix: str,
    embeddings: Mapping[str, Grid],
    grids: Mapping[str, Mapping[str, Grid]],
    unpacked: Counter[str],
) -> "UnpackedEmbeddingMethod | None":
    """The method of an embedding, or of an output head that is not tied to one; None where it is floats.

    `embeddings` and `grids` are those of a checkpoint's embedding and linears; what unpacking costs is added to
    `unpacked`. Raises CheckpointError for a head in factors.
    """
    found: Mapping[str, Grid | None] = embeddings
    if isinstance(layer, ParallelLMHead):
        found = {prefix: grids[prefix].get("")} if prefix in grids else {}
    for name, grid in found.items():
        if grid is None:
            raise CheckpointError(f"vLLM has no factors for the output head {name!r}; keep it dense")
        rows, size, itemsize = layer.org_vocab_size, layer.embedding_dim, torch.get_default_dtype().itemsize
        unpacked[name] += rows * size * itemsize - grid.nbytes(rows, size, itemsize)
        return UnpackedEmbeddingMethod(name, grid)
    return None


class UnpackedEmbeddingMethod(UnquantizedEmbeddingMethod):
    """vLLM's own method for floats, with slots for the tensors of integers on `grid`.

    vLLM does not tell an embedding its name: `name` is that of the checkpoint, for messages.
    """

    def __init__(self, name: str, grid: Grid) -> None:
        super().__init__()
        self.name, self.grid = name, grid
        self.held: PackedLinear | None = None
        self.missing: set[str] = set()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The weight in floats, and the slots that the loader fills."""
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        self.held = PackedLinear(layer.embedding_dim, layer.org_vocab_size, self.grid, bias=False, dtype=params_dtype)
        self.missing = set(self.held.state_dict())
        layer.weight.weight_loader = self._guard
        for name, tensor in self.held.state_dict().items():
            slot = nn.Parameter(tensor.new_empty(0), requires_grad=False)
            slot.weight_loader = partial(self._load, layer, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, slot)

    def _guard(self, weight: nn.Parameter, tensor: torch.Tensor) -> None:
        if tensor.numel():  # else the guard against loaders that know no integers
            raise CheckpointError(f"the checkpoint holds dense weights of {self.name}, whose config says integers")

    def _load(self, layer: Any, name: str, slot: nn.Parameter, tensor: torch.Tensor) -> None:
        """Keep a tensor; with the last one, unpack those rows that this process has."""
        assert self.held is not None
        place = getattr(self.held, name)
        check_shape(f"{self.name}.{name}", tensor, place.shape)
        place.copy_(tensor)
        self.missing.discard(name)
        if self.missing:
            return
        try:
            self.held.loaded()
        except ModelError as error:
            raise CheckpointError(f"{self.name}.{error}; copy or compress the checkpoint again") from error
        layer.weight_loader(layer.weight, self.held.dense().to(layer.weight.device))
        self.held = None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the slots away. Raises CheckpointError if a tensor never arrived."""
        if self.missing:
            raise CheckpointError(f"the checkpoint lacks {self.name}.{min(self.missing)}; copy or compress it again")
        for name in list(layer._parameters):
            if name.startswith("weight_"):
                delattr(layer, name)
        super().process_weights_after_loading(layer)
