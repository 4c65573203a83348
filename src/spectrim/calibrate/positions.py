"""Which positions of a batch count."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.errors import ModelError, SampleError
from spectrim.linear import Place


@dataclass(frozen=True)
class Positions:
    """The positions of one batch that count, in the layouts in which linears see them.

    Text positions are those of ``input_ids``; None where all count. Tiles are the parts into which Mllama cuts an
    image: unused tiles, and the rows past ``patches`` that fill up each tile, are padding.
    """

    shape: tuple[int, int]  # of input_ids: [batch, seq]
    tokens: torch.Tensor | None  # bool [batch * seq]
    tiles: torch.Tensor | None  # bool [batch * images * tiles]
    patches: int  # rows of a tile that are no padding

    def select(self, place: Place, x: torch.Tensor) -> torch.Tensor:
        """The positions of ``x`` [*layout, width] that count, [positions, width]."""
        mask = self.rows(place, x.shape[:-1])
        rows = x.reshape(-1, x.shape[-1])
        return rows if mask is None else rows[mask.to(rows.device)]

    def average(self, place: Place, x: torch.Tensor) -> torch.Tensor:
        """The same, averaged over the samples of the batch position by position: [positions of one sample, width].

        Raises:
            SampleError: samples do not have the same number of positions that count.
        """
        samples, layout = self.shape[0], x.shape[:-1]
        if alike := not self.chosen(place, layout) and layout.numel() % samples == 0:
            mask = self.rows(place, layout)
            counts = None if mask is None else mask.view(samples, -1).sum(1)
            alike = counts is None or bool((counts == counts[0]).all())
        if not alike:
            raise SampleError(
                "samples of one bucket differ in their positions and cannot be averaged; set compensate.buckets=null"
            )
        rows = self.select(place, x)
        return rows.view(samples, -1, rows.shape[-1]).mean(0)

    def split(self, place: Place, layout: torch.Size) -> list[int] | None:
        """How many rows of `select` are of each sample, whose rows follow each other; None where that is not known."""
        samples, mask = self.shape[0], self.rows(place, layout)
        if samples == 1:
            return [layout.numel() if mask is None else int(mask.sum())]
        if self.chosen(place, layout) or layout.numel() % samples:
            return None
        return [layout.numel() // samples] * samples if mask is None else mask.view(samples, -1).sum(1).tolist()

    def chosen(self, place: Place, layout: torch.Size) -> bool:
        """Whether a linear reads only the positions that are routed to it, as an expert does."""
        return place == "backbone" and len(layout) == 1 and layout.numel() != self.shape[0] * self.shape[1]

    def rows(self, place: Place, layout: torch.Size) -> torch.Tensor | None:
        """Bool mask over the flattened positions of an input ``[*layout, in]``; None where all count."""
        if place == "backbone" and layout in (self.shape, (self.shape[0] * self.shape[1],)):
            return self.tokens
        if self.tiles is None or layout.numel() % self.tiles.numel():
            return None
        inside = torch.arange(layout.numel() // self.tiles.numel(), device=self.tiles.device) < self.patches
        return (self.tiles[:, None] & inside).flatten()


def positions(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], *, image_tokens_only: bool) -> Positions:
    """Positions that count in a batch of keyword arguments of ``model.forward``.

    Raises:
        ModelError: ``image_tokens_only`` with a model that names no image token.
        SampleError: ``image_tokens_only`` and the batch has no image token.
    """
    ids = inputs["input_ids"]
    attention = inputs.get("attention_mask")
    tokens = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention.bool()
    if image_tokens_only:
        tokens = tokens & (ids == image_token(model))
        if not tokens.any():
            raise SampleError("an image sample has no image token in its prompt; check the processor's chat template")
    tiles, patches = inputs.get("aspect_ratio_mask"), 0
    if tiles is not None:
        side = inputs["pixel_values"].shape[-1] // model.config.vision_config.patch_size
        tiles, patches = tiles.bool().flatten(), side * side + 1  # and the class token
    return Positions((ids.shape[0], ids.shape[1]), None if tokens.all() else tokens.flatten(), tiles, patches)


def image_token(model: PreTrainedModel) -> int:
    """Id of the token that stands for a piece of an image; ModelError where the config names none."""
    config: Any = model.config
    for key in ("image_token_id", "image_token_index"):
        if isinstance(token := getattr(config, key, None), int):
            return token
    raise ModelError("the model's config names no image token; calibrate without image_tokens_only")
