"""The weight of a compressed layer as model code may read it: shape and dtype at once, values computed on demand."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from spectrim.errors import ModelError

_DATA: Any = vars(torch._C.TensorBase)["data"].__get__  # a new object on every look

_GETTERS = ("device", "dtype", "is_cpu", "is_cuda", "is_meta", "itemsize", "layout", "ndim", "requires_grad", "shape")
_METHODS = ("dim", "element_size", "get_device", "is_complex", "is_floating_point", "nelement", "numel", "size")

DESCRIBING: frozenset[Any] = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _GETTERS]
    + [getattr(torch.Tensor, name) for name in _METHODS]
    + [torch.Tensor.__len__, torch.is_complex, torch.is_floating_point, torch.numel]
)
"""Functions that read properties of a tensor, such as its shape, and none of its values."""


class LazyWeight(torch.Tensor):
    """A weight that is computed, by `make`, whenever a function reads its values; gradients flow through it.

    It stores a single number. Writing to it raises ModelError: the values would be lost.
    """

    make: Callable[[], torch.Tensor]

    @classmethod
    def of(
        cls, make: Callable[[], torch.Tensor], size: Sequence[int], like: torch.Tensor, requires_grad: bool
    ) -> torch.Tensor:
        """A weight of this size, with the dtype and device of `like`; compiled code gets the values at once."""
        if torch.compiler.is_compiling():
            return make()
        with torch._C.DisableTorchFunctionSubclass():
            weight = like.detach().new_full((1, 1), torch.nan).expand(size).as_subclass(cls)
            weight.requires_grad_(requires_grad)
        weight.make = make
        vars(weight)["_is_hf_initialized"] = True  # transformers then leaves it alone where it initializes modules
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Read properties directly; compute the values for every other function."""
        kwargs = kwargs or {}
        if func in DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name, written = func.__name__, args[0] if args else kwargs.get("tensor")
        writes = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        if writes and isinstance(written, LazyWeight):
            raise ModelError(
                "the weight of a compressed layer is computed from its parts; dequantize the model to write it"
            )
        if func == _DATA:
            weight = args[0]
            return cls.of(lambda: weight.make().detach(), weight.shape, weight, False)
        args, kwargs = tree_map_only(LazyWeight, lambda weight: weight.make(), (args, kwargs))
        return func(*args, **kwargs)
