"""A decoder layer of Qwen2's shape for one new token of each sequence, with whatever linears and attention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu

Make = Callable[[int, int], nn.Module]  # of outputs and inputs
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Of a model: width, query heads, key/value heads, numbers of a head, width of the MLP, and layers."""

    width: int
    heads: int
    shared: int
    head: int
    inner: int
    layers: int


SEVEN = Shape(3584, 28, 4, 128, 18944, 28)  # Qwen2-7B
SMALL = Shape(256, 4, 2, 64, 512, 2)


class Layer(nn.Module):
    """Calls ``attend(q, k, v)`` with [B, heads · head] and twice [B, kept], which gives [B, heads · head]."""

    def __init__(self, shape: Shape, make: Make, attend: Attend, kept: int | None = None) -> None:
        super().__init__()
        kept = shape.shared * shape.head if kept is None else kept
        self.attend = attend
        self.q, self.o = make(shape.heads * shape.head, shape.width), make(shape.width, shape.heads * shape.head)
        self.k, self.v = make(kept, shape.width), make(kept, shape.width)
        self.gate, self.up = make(shape.inner, shape.width), make(shape.inner, shape.width)
        self.down = make(shape.width, shape.inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, width] to the same."""
        h = rms_norm(x, x.shape[-1:])
        x = x + self.o(self.attend(self.q(h), self.k(h), self.v(h)))
        h = rms_norm(x, x.shape[-1:])
        return x + self.down(silu(self.gate(h)) * self.up(h))


def chain(layers: list[Layer], x: torch.Tensor) -> torch.Tensor:
    """One token through all layers."""
    for layer in layers:
        x = layer(x)
    return x
