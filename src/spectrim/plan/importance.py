"""Importance of blocks for adaCR's allocation: how similar their output is to their input (AdaSVD, section 3)."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.calibrate.data import Data
from spectrim.calibrate.passes import forward_options, model_inputs, prepared
from spectrim.calibrate.positions import Positions, positions
from spectrim.errors import ModelError
from spectrim.maths.roots import check_finite

SAMPLES = 8  # of each modality


def block_cosines(
    model: PreTrainedModel, parts: Anatomy, data: Data, *, image_tokens_only: bool = False
) -> dict[str, float]:
    """Mean cosine between input and output of every block that samples reach, over the positions that count.

    The samples of all modalities run through the dense model one at a time; every position weighs the same.

    Raises:
        ModelError: a block gives another shape than it reads.
        NumericalError: NaN or infinity; names the block.
    """
    sums: dict[str, list[torch.Tensor]] = {}
    places = {linear.block: linear.place for linear in parts.linears if linear.block is not None}

    def after(
        block: str, counted: Positions, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any
    ) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        y = given if isinstance(given, torch.Tensor) else given[0]
        if x.shape != y.shape:
            raise ModelError(f"block {block} changes the shape of what it reads; set allocation.rule=uniform")
        before, behind = (counted.select(places[block], each).double() for each in (x, y))
        found = torch.nn.functional.cosine_similarity(before, behind, dim=-1)
        sums.setdefault(block, []).append(check_finite(f"the output of block {block}", found))

    with prepared(model), torch.no_grad():
        for modality in data.samples:
            for batch in data.batches(modality, 1):
                inputs = model_inputs(model, batch)
                counted = positions(model, inputs, image_tokens_only=image_tokens_only and modality == "image")
                handles = [
                    model.get_submodule(block).register_forward_hook(partial(after, block, counted), with_kwargs=True)
                    for block in places
                ]
                try:
                    model(**inputs, **forward_options(model))
                finally:
                    for handle in handles:
                        handle.remove()
    return {block: float(torch.cat(found).mean()) for block, found in sums.items()}


def importance(parts: Anatomy, cosines: Mapping[str, float], kind: Literal["cos", "1-cos"]) -> dict[str, float]:
    """Importance of every linear: that of its block, with a mean of 1 by bytes over the linears of measured blocks.

    Linears outside blocks, and in blocks that no sample reaches, have 1. A negative cosine counts as 0. If the
    importance of all blocks is 0, all linears have 1.
    """
    blocks = {block: max(0.0, cosine if kind == "cos" else 1 - cosine) for block, cosine in cosines.items()}
    raw = {linear: blocks[linear.block] for linear in parts.linears if linear.block in blocks}
    mean = sum(value * linear.nbytes for linear, value in raw.items()) / max(1, sum(linear.nbytes for linear in raw))
    return {linear.name: raw[linear] / mean if linear in raw and mean else 1.0 for linear in parts.linears}
