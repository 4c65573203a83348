"""Linears of vLLM, in one of several processes, with the tensors of ours. Importing it needs vLLM."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear

from compressed import pack_nearest, randomised
from spectrim.checkpoint import SpectrimConfig
from spectrim.maths.decompose import Rank
from spectrim.maths.rounding import Grid, fitting_group
from spectrim.serve.plugin import FactoredConfig
from spectrim.storage import StoredLayer
from spectrim.storage.layers import LowRankLinear
from spectrim.storage.packed import PackedLinear


def part(out: int, rank: Rank | None, pivoted: bool, inputs: int) -> torch.nn.Module:
    """A dense or factored linear with random values; pivots anywhere."""
    if rank is None:
        return torch.nn.Linear(inputs, out)
    return randomised(LowRankLinear(inputs, out, rank, pivoted=pivoted))


def rounded(
    layer: torch.nn.Module,
    integers: list[str],
    bits: int,
    symmetric: bool,
    group: int | None = 128,
    *,
    rotated: bool = False,
) -> torch.nn.Module:
    """A linear with these parts as integers; those that read its inputs may rotate them."""
    model = torch.nn.Module()
    model.x = layer
    grids = {}
    for name in integers:
        reads = name in ("", "B", "R")
        size = layer.in_features if reads else layer.get_submodule(name).in_features
        grids[f"x.{name}".removesuffix(".")] = Grid(bits, fitting_group(size, group), symmetric, rotated and reads)
    pack_nearest(model, grids)
    return model.x


def config(parts: dict[str, torch.nn.Module], runtime: str = "auto") -> FactoredConfig:
    """vLLM's view of a checkpoint of these layers."""
    stored = {name: (layer.form, layer.spec) for name, layer in parts.items() if isinstance(layer, StoredLayer)}
    found = SpectrimConfig.of(stored)
    found.runtime = runtime
    made = FactoredConfig(found)
    made.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return made


def fill(layer: Any, source: torch.nn.Module, shard: str | None = None) -> None:
    """Load the tensors of a part, and the guard that stands beside factors, as vLLM's loader does."""
    tensors = dict(source.state_dict())
    if isinstance(source, LowRankLinear | PackedLinear):
        tensors["weight"] = torch.empty(0)
    for name, tensor in sorted(tensors.items()):  # as they come from a file
        slot = layer.get_parameter(name)
        slot.weight_loader(slot, tensor.clone(), *([] if shard is None else [shard]))


def row_parallel(source: Any, settings: FactoredConfig, **options: Any) -> Any:
    """vLLM's linear ``x.down`` with the tensors of `source`."""
    options = {"params_dtype": torch.float32, **options}
    layer = vllm_linear.RowParallelLinear(
        source.in_features, source.out_features, quant_config=settings, prefix="x.down", **options
    )
    fill(layer, source)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@contextmanager
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """``become(rank, size)``: vLLM's layers are built as in that one of `size` processes."""

    def become(rank: int, size: int) -> None:
        for module in (vllm_linear, vllm_parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    with set_current_vllm_config(VllmConfig()):
        yield become
