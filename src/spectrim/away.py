"""Values of parameters that accelerate keeps elsewhere, such as on disk, and brings in for a module's forward alone."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from spectrim.errors import ModelError


def values(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """A parameter of a module, from where its values are; without gradient.

    Raises:
        ModelError: it is on the meta device, and nothing says where its values are.
    """
    parameter: Any = getattr(module, name)
    if not parameter.is_meta:
        return parameter.detach()  # type: ignore[no-any-return]
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if (kept := getattr(one, "weights_map", None)) is not None:
            return torch.as_tensor(kept[name]).to(parameter.dtype)
    raise ModelError(f"a {name} of {type(module).__name__} has no values; load the model into memory")


def is_away(model: nn.Module) -> bool:
    """Whether some parameters of a model are elsewhere."""
    return any(parameter.is_meta for parameter in model.parameters())


def here(linear: nn.Linear) -> nn.Linear:
    """The linear itself, or one like it that has its values where they belong to another place."""
    if type(linear) is not nn.Linear or not linear.weight.is_meta or not hasattr(linear, "_hf_hook"):
        return linear
    weight = values(linear)
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    found = skip_init(nn.Linear, linear.in_features, linear.out_features, linear.bias is not None, **like)
    found.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        found.bias = nn.Parameter(values(linear, "bias"), requires_grad=linear.bias.requires_grad)
    return found.train(linear.training)
