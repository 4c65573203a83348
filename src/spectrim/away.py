"""Values of parameters that accelerate keeps elsewhere, such as on disk, and brings in for a module's forward alone."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
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
    if (hook := _hook(module)) is not None:
        return torch.as_tensor(hook.weights_map[name]).to(parameter.dtype)
    raise ModelError(f"a {name} of {type(module).__name__} has no values; load the model into memory")


def _hook(module: nn.Module) -> Any:
    """Accelerate's hook that brings the parameters of a module in; None without one."""
    hook: Any = getattr(module, "_hf_hook", None)
    each = getattr(hook, "hooks", (hook,))
    return next((one for one in each if getattr(one, "weights_map", None) is not None), None)


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


class Away:
    """The parameters of one module that accelerate keeps elsewhere."""

    def __init__(self, hook: Any) -> None:
        self.device = hook.execution_device
        self._kept = hook.weights_map

    def row(self, name: str, number: int) -> torch.Tensor:
        """One row of a parameter along its first dimension; of a safetensors file nothing else is read."""
        loader, key = getattr(self._kept, "dataset", None), f"{getattr(self._kept, 'prefix', '')}{name}"
        place = getattr(loader, "index", {}).get(key, {})
        if "safetensors_file" not in place:
            return torch.as_tensor(self._kept[name])[number]
        with safe_open(place["safetensors_file"], framework="pt") as tensors:
            found: torch.Tensor = tensors.get_slice(place["weight_name"])[number]
        return found.to(getattr(torch, place["dtype"]))


def forget_away(module: nn.Module) -> Away | None:
    """Where a module's own parameters are if not in memory, and its hook, which brought them in, is gone; else None."""
    hook = _hook(module)
    if hook is None or not any(x.is_meta for x in module.parameters(recurse=False)):
        return None
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module)
    return Away(hook)


def keep_away(module: nn.Module, kept: Mapping[str, torch.Tensor], device: torch.device | str | int = "cpu") -> None:
    """Take the values of a module's tensors from `kept` whenever it runs, or is saved, and let go of them after it."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hook = AlignDevicesHook(device, offload=True, offload_buffers=True, place_submodules=True, weights_map=kept)
    add_hook_to_module(module, hook)
