"""A_v of all heads inside the product that reads what attention gives (docs/methods.md, section 10).

The mean latents of a step then go into ``o_proj`` as they are: columns ``W_i`` of query head i become ``W_i A_v,h``,
r_h for the d of a head. The first tokens attend with whole values and the weight as it is stored, so both are held; the
folded one is no part of the state dict, and is made anew for the next cache after weights have changed.
"""

from dataclasses import dataclass
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import nn

from spectrim.errors import ModelError
from spectrim.latent.attention import Site, running

_HELD = "_folded"  # attribute of the linear that reads


@dataclass(frozen=True, eq=False)
class Folded:
    """What a linear gives of mean latents, as weight [out, Hq / H · Σ r_h] and constant [out]; copies share it."""

    weight: torch.Tensor
    constant: torch.Tensor | None
    made_of: tuple[Any, ...]

    def __deepcopy__(self, memo: Any) -> "Folded":
        return self


def fold(site: Site) -> Folded | None:
    """The folded product of an attention module; None where its values are kept whole.

    Raises ModelError where anything else than one dense linear reads what attention gives: `o_proj`, or its factor B.
    """
    if not isinstance(site.v, nn.Module):
        return None
    reader = _reader(site.module)
    tensors = (*chain(site.v.parameters(), site.v.buffers()), *reader.parameters())
    made_of = tuple((x.data_ptr(), 0 if x.is_inference() else x._version, x.dtype, x.device) for x in tensors)
    held: Folded | None = vars(reader).get(_HELD)
    if held is None or held.made_of != made_of:
        vars(reader)[_HELD] = held = Folded(*_product(site, reader), made_of)
        vars(reader).setdefault("forward", MethodType(_read, reader))  # copies of the linear have a method of their own
    return held


def unfold(model: nn.Module) -> None:
    """Take all folded products off a model."""
    for module in model.modules():
        vars(module).pop(_HELD, None)
        if getattr(vars(module).get("forward"), "__func__", None) is _read:
            del vars(module)["forward"]


def _reader(module: Any) -> nn.Linear:
    """The linear that reads what an attention module's heads give."""
    whole = getattr(module, "o_proj", None)
    reader = getattr(whole, "reader", whole)
    if type(reader) is not nn.Linear or reader.weight.is_meta:
        kind = "not there" if reader is None else f"a {type(whole).__name__} that is not read by one linear in memory"
        raise ModelError(
            f"values cannot be folded into the o_proj of {type(module).__name__}, which is {kind}; leave folding out"
        )
    return reader


@torch.no_grad()
def _product(site: Site, reader: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and constant, formed in float32 or wider and rounded once."""
    wide = torch.promote_types(reader.weight.dtype, torch.float32)
    heads, bias, constant = site.v.head_weights(), site.v.bias, reader.bias
    parts = reader.weight.to(wide).view(reader.out_features, len(heads), -1, len(heads[0]))  # [out, H, group, d]
    weight = torch.cat([(parts[:, h] @ A.to(wide)).flatten(1) for h, A in enumerate(heads)], dim=1)
    if bias is not None:
        moved = (parts.sum(2) * bias.to(wide).view(len(heads), -1)).sum((1, 2))  # weights of attention sum to one
        constant = moved.to(reader.weight.dtype) if constant is None else (constant + moved).to(reader.weight.dtype)
    return weight.to(reader.weight.dtype), constant


def _read(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """The forward pass of a linear that reads mean latents where attention gave them."""
    call = running()
    if call is None or call.layer.folded is None:
        return nn.Linear.forward(self, input)
    call.read = True
    if call.given is None:
        folded: Folded = call.layer.folded
        return nn.functional.linear(input, folded.weight, folded.constant)
    rows = input.reshape(len(call.given), -1, input.shape[-1])[:, -call.given.shape[1] :]
    if not torch.equal(rows, call.given):
        raise ModelError(
            f"{type(call.layer.site.module).__name__} changes what attention gives before o_proj reads it; leave "
            "folding out"
        )
    return nn.Linear.forward(self, input)
