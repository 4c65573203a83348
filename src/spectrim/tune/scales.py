"""Integers whose scales are trained: products that pass gradients to inputs and scales."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from spectrim.storage.packed import PackedLinear, numbers


class _Product(torch.autograd.Function):
    """``x Wᵀ`` [..., out] of x [..., in] and W = scale · codes; W is formed again in the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, codes, scale)
        return x @ _weight(codes, scale).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor]:
        (x, codes, scale), (g,) = ctx.saved_tensors, gradients
        of_input = g @ _weight(codes, scale) if ctx.needs_input_grad[0] else None
        of_weight = g.flatten(0, -2).T @ x.flatten(0, -2)  # [out, in]
        groups = (scale.shape[1], -1)
        return of_input, None, (of_weight.unflatten(1, groups) * codes.unflatten(1, groups)).sum(-1)


def _weight(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return numbers(codes.to(scale.dtype), scale, None)


@contextmanager
def trained_scales(layers: Iterable[PackedLinear]) -> Iterator[None]:
    """Inside the block these layers multiply with their ``weight_scale`` as it is then, and gradients flow to it.

    Codes are unpacked once, zero points taken off: int16 [out, in], int8 where there are none.
    """
    held = list(layers)
    try:
        for layer in held:
            codes, zeros = layer.codes(), layer.zeros()
            if zeros is not None:
                codes = (codes.unflatten(1, (zeros.shape[1], -1)).short() - zeros[..., None]).flatten(1)
            layer.forward = _forward(layer, codes)  # type: ignore[method-assign]
        yield
    finally:
        for layer in held:
            vars(layer).pop("forward", None)


def _forward(layer: PackedLinear, codes: torch.Tensor) -> Any:
    def forward(input: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Product.apply(layer.read(input), codes, layer.weight_scale)
        return y if layer.bias is None else y + layer.bias

    return forward
