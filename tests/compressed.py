"""Compressed few-layer models, and ways to look into and to damage a checkpoint."""

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from families import FAMILIES, example_inputs
from helpers.exchanged import pack_linears, replace_linears
from spectrim.anatomy import anatomy
from spectrim.maths.decompose import Rank, head_ranks
from spectrim.maths.rotation import BLOCK
from spectrim.maths.rounding import Grid, fitting_group, quantize
from spectrim.storage.layers import LowRankLinear

MAIN = ("qwen2_5_vl", "llava", "idefics3", "llama")


def factored(family: str, model: Any = None, form: str = "whole") -> hf.PreTrainedModel:
    """A few-layer model with all its linears cut to a third of their rank; no two layers have the same factors.

    In the form ``headwise``, each head of every q, k and v has its own rank: a third of it, and more from head to head.
    In the form ``pivoted``, all are stored by pivots. In the form ``mixed``, linears take turns in these three.
    """
    if model is not None:
        return _factored(model, form)
    torch.manual_seed(0)  # as making a model does
    return copy.deepcopy(_made(family, form))


@cache
def _made(family: str, form: str) -> hf.PreTrainedModel:
    return _factored(FAMILIES[family](), form)


def _factored(model: Any, form: str) -> hf.PreTrainedModel:
    linears = anatomy(model).linears
    dense = {linear.name: model.get_submodule(linear.name).weight.detach() for linear in linears}
    ranks: dict[str, Rank] = {name: max(1, min(weight.shape) // 3) for name, weight in dense.items()}
    turns = {
        x.name: ("whole", "headwise", "pivoted")[n % 3] if form == "mixed" else form for n, x in enumerate(linears)
    }
    apart = {x.name: x.heads for x in linears if x.role in ("q", "k", "v") and x.heads and turns[x.name] == "headwise"}
    assert apart or form != "headwise"
    ranks |= {n: tuple(len(dense[n]) // heads // 3 + h for h in range(heads)) for n, heads in apart.items()}
    return cut_linears(model, ranks, [name for name, turn in turns.items() if turn == "pivoted"])


def cut_linears(model: Any, ranks: dict[str, Rank], pivoted: Collection[str]) -> hf.PreTrainedModel:
    """The model with these linears exchanged for their best factors of these ranks, in place."""
    dense = {name: model.get_submodule(name).weight.detach() for name in ranks}
    replace_linears(model, ranks, pivoted)
    for name, weight in dense.items():
        each = head_ranks(ranks[name])
        A, B = zip(*(cut(rows, k) for rows, k in zip(weight.chunk(len(each)), each, strict=True)), strict=True)
        model.get_submodule(name).load_factors(torch.block_diag(*A), torch.cat(B))
    return model


@torch.no_grad()
def pack_nearest(model: nn.Module, grids: Mapping[str, Grid]) -> None:
    """Round these linears of the model, in place; a rest ``X.R``, of which there is none before, is random."""
    found = {}
    for name, grid in grids.items():
        owner, _, part = name.rpartition(".")
        if part == "R":
            layer = model.get_submodule(owner)
            W = 0.1 * torch.randn(layer.out_features, layer.in_features, dtype=layer.B.weight.dtype)
        else:
            W = model.get_submodule(name).weight.detach()
        found[name] = quantize(W, grid, dtype=W.dtype)
    pack_linears(model, grids)
    for name, integers in found.items():
        model.get_submodule(name).load(integers)


@torch.no_grad()
def randomised(layer: LowRankLinear) -> LowRankLinear:
    """The layer with random factors and bias; the rows of its pivots, if any, are spread over it."""
    for parameter in layer.parameters():
        parameter.normal_()
    if layer.pivots is not None:
        layer.pivots.copy_(torch.randperm(layer.out_features)[: len(layer.pivots)].sort().values)
        layer.loaded()
    return layer


def cut(weight: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors A [out, k] and B [k, in]."""
    U, s, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return U[:, :k] * s[:k].sqrt(), s[:k, None].sqrt() * Vh[:k]


def factor_pairs(layer: LowRankLinear) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A_h [out / H, k_h] and B_h [k_h, in] of each head; one pair where the layer is factored as a whole."""
    heads = [layer.A] if isinstance(layer.rank, int) else layer.A
    parts = layer.B.weight.split(head_ranks(layer.rank))
    return [(head.weight, part) for head, part in zip(heads, parts, strict=True)]


def product(layer: LowRankLinear) -> torch.Tensor:
    """The weight [out, in] that a layer stands for, from its stored tensors."""
    if layer.pivots is None:
        return torch.cat([A @ B for A, B in factor_pairs(layer)])
    W, pivots = torch.empty(layer.out_features, layer.in_features, dtype=layer.B.weight.dtype), layer.pivots.tolist()
    W[pivots] = layer.B.weight.detach()
    W[[row for row in range(len(W)) if row not in pivots]] = (layer.A.weight @ layer.B.weight).detach()
    return W


def assembled(layer: LowRankLinear) -> torch.Tensor:
    """A [out, sum of the ranks], zero outside the blocks of the heads."""
    return torch.block_diag(*(A for A, _ in factor_pairs(layer)))


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


PACKED_FORMS = ("dense", "factors", "B alone", "rest", "plain")


def grid_of(size: int, bits: int, symmetric: bool) -> Grid:
    return Grid(bits, fitting_group(size, 32), symmetric)


def packed(family: str, model: Any = None) -> Any:
    """A few-layer model whose linears take turns: packed, factored and packed in three ways, and left as they are."""
    model = FAMILIES[family]() if model is None else model
    for number, linear in enumerate(anatomy(model).linears):
        form, bits, symmetric = PACKED_FORMS[number % len(PACKED_FORMS)], (3, 4, 8, 2)[number % 4], number % 2 == 0
        W = model.get_submodule(linear.name).weight.detach()
        parts = {}
        if form == "dense":
            parts = {linear.name: W}
        elif form != "plain":
            A, B = cut(W, min(W.shape) // 3)
            replace_linears(model, {linear.name: len(B)})
            model.get_submodule(linear.name).load_factors(A, B)
            parts = {f"{linear.name}.B": B} | ({} if form == "B alone" else {f"{linear.name}.A": A})
            if form == "rest":
                parts[f"{linear.name}.R"] = W.float() - A @ B
        found = {}
        for name, X in parts.items():
            turns = number % 3 == 0 and X.shape[1] % BLOCK == 0
            grid = replace(grid_of(X.shape[1], bits, symmetric), rotated=turns)
            found[name] = quantize(X, grid, dtype=model.dtype)
        pack_linears(model, {name: each.grid for name, each in found.items()})
        for name, each in found.items():
            model.get_submodule(name).load(each)
    return model
