"""Weights of one shape in one tensor, and one product for all of them in place of one for each.

A product of few rows with a small weight takes longer to begin than to compute.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

ROWS = 16  # of inputs of one weight, up to which zeros in the place of missing rows cost less than products one by one
_CALL = 3 << 16  # bytes of a weight that are read in the time that a product of its own takes to begin


def is_plain(module: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling a module is what its class says and no more: no adapter, no offloading, nobody who watches."""
    watched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not watched


@torch.no_grad()
def stack(linears: Sequence[nn.Module]) -> None:
    """Put the weights of linears, or of their factors, into one tensor each, where `together` may run them."""
    for weights in _weights(linears):
        first = weights[0]
        alike = all((w.shape, w.dtype, w.device) == (first.shape, first.dtype, first.device) for w in weights)
        if alike and not first.is_meta and _stacked(weights) is None:
            for weight, slot in zip(weights, torch.stack([weight.data for weight in weights]), strict=True):
                weight.data = slot


def together(
    linears: Sequence[nn.Module], dtype: torch.dtype, hit: int
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What maps inputs [n, rows, in] of n linears to outputs [n, rows, out]; None unless `stack` made it possible.

    None as well where reading those that are not among the `hit` ones takes longer than products one by one. Without
    gradients. A linear is a plain one, or a layer with `factors_alone`, which an input passes in turn; either all have
    a bias or none has.
    """
    each = _weights(linears)
    stacks = [W for weights in each if (W := _stacked(weights)) is not None and W.dtype == dtype]
    size = sum(W.nbytes for W in stacks)
    if not stacks or len(stacks) < len(each) or size > hit * (size / len(linears) + _CALL * len(stacks)):
        return None
    biases: list[Any] = [one._parameters.get("bias") for one in linears]
    orders: list[Any] = [one._buffers.get("order") for one in linears]

    def run(x: torch.Tensor) -> torch.Tensor:
        outputs = [x]
        for W in stacks:
            outputs.append(torch.bmm(outputs[-1], W.mT))
        y = outputs[-1]
        if orders[0] is not None:  # of pivots, whose outputs are those of the first factor
            y = torch.cat(outputs[1:], -1)
            y = torch.empty_like(y).scatter_(-1, torch.stack(orders)[:, None].expand_as(y), y)
        return y if biases[0] is None else y + torch.stack(biases)[:, None]

    return run


def _weights(linears: Sequence[Any]) -> list[list[nn.Parameter]]:
    """The weights of all linears, or of all first and all second factors; none where one has others."""
    found: list[list[nn.Parameter]] = []
    for linear in linears:
        parts = (linear,) if is_plain(linear) else getattr(linear, "factors_alone", None)
        if parts is None or (found and len(parts) != len(found[0])):
            return []
        found.append([part._parameters["weight"] for part in parts])
    return [list(weights) for weights in zip(*found, strict=True)]


def _stacked(weights: Sequence[nn.Parameter]) -> torch.Tensor | None:
    """Weights [n, out, in] that lie one after another in one tensor; None where they do not."""
    first, last = weights[0].detach(), weights[-1].detach()
    start, shape = first.data_ptr(), first.shape
    if first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr() or not first.is_contiguous():
        return None
    places = range(start, start + len(weights) * first.nbytes, first.nbytes or 1)
    if any(w.data_ptr() != place or w.shape != shape for w, place in zip(weights, places, strict=False)):
        return None
    return row_of(first, len(weights))


def row_of(first: torch.Tensor, count: int) -> torch.Tensor:
    """The tensor [count, …] of those that lie one after another from the first on."""
    return first.as_strided((count, *first.shape), (first.numel(), *first.stride()))
