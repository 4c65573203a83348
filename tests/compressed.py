"""Compressed few-layer models, and ways to look into and to damage a checkpoint."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from families import FAMILIES, example_inputs
from spectrim.anatomy import anatomy
from spectrim.layers import LowRankLinear, replace_linears

MAIN = ("qwen2_5_vl", "llava", "idefics3", "llama")


def factored(family: str, model: Any = None) -> hf.PreTrainedModel:
    """A few-layer model with all its linears cut to a third of their rank; no two layers have the same factors."""
    model = FAMILIES[family]() if model is None else model
    dense = {linear.name: model.get_submodule(linear.name).weight.detach() for linear in anatomy(model).linears}
    replace_linears(model, {name: max(1, min(weight.shape) // 3) for name, weight in dense.items()})
    for name, weight in dense.items():
        layer = model.get_submodule(name)
        U, s, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
        k = layer.rank
        with torch.no_grad():
            layer.A.weight.copy_(U[:, :k] * s[:k].sqrt())
            layer.B.weight.copy_(s[:k, None].sqrt() * Vh[:k])
    return model


@torch.no_grad()
def logits(model: hf.PreTrainedModel, seed: int = 0) -> torch.Tensor:
    inputs = example_inputs(model, seed=seed)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return model(**inputs).logits


def low_rank(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


@contextmanager
def edited(directory: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Change the tensors of a checkpoint."""
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    yield tensors
    save_file(tensors, file, metadata={"format": "pt"})
