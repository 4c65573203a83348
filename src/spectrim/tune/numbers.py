"""What of a compressed model is trained: its stored floats, norms and biases, each in units of its own size."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from spectrim.storage import stored_layers
from spectrim.storage.packed import PackedLinear


@dataclass(frozen=True)
class Number:
    """One tensor of a model, and a float32 parameter that stands for it: ``tensor = master · unit``.

    The unit is the root mean square of a tensor, and of scales each scale by itself, so that one rate fits all and no
    scale changes its sign. ``mean`` is that of the master's last values, which is nearer to the optimum than each is.
    """

    name: str
    tensor: torch.Tensor
    unit: torch.Tensor
    master: nn.Parameter
    mean: torch.Tensor

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, *, each: bool) -> "Number":
        """A tensor as it is; with a unit for `each` of its elements."""
        values = tensor.detach().float()
        unit = values.abs() if each else values.square().mean().sqrt()
        own = _in_units(values, unit)
        return cls(name, tensor, unit, nn.Parameter(own), own.clone())

    def add(self, gradient: torch.Tensor | None, share: float = 1.0) -> None:
        """Add `share` times a gradient of the tensor to that of the master."""
        if gradient is not None:
            own = gradient.float() * (share * self.unit)
            self.master.grad = own if self.master.grad is None else self.master.grad.add_(own)

    def write(self) -> None:
        """Bring the tensor up to date."""
        self.tensor.data.copy_(self.master.detach() * self.unit)

    def average(self, share: float) -> None:
        """Move the mean to the master by a share of the way."""
        self.mean.lerp_(self.master.detach(), share)

    def write_mean(self) -> None:
        """Put the mean into the tensor."""
        self.tensor.data.copy_(self.mean * self.unit)

    def restore(self, values: torch.Tensor) -> None:
        """Go back to earlier values of the tensor."""
        self.tensor.data.copy_(values)
        self.master.data.copy_(_in_units(values.float(), self.unit))
        self.mean.copy_(self.master.detach())


def _in_units(values: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return torch.where(unit > 0, values / unit, 0.0)


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    """Its integers: linears, factors, and what stands beside factors; no embedding, and no head that is one."""
    found = [part for layer in stored_layers(model).values() for part in layer.modules()]
    return [part for part in found if type(part) is PackedLinear]


def numbers(model: nn.Module) -> Iterator[Number]:
    """All that is trained of a compressed model and not zero throughout.

    That is every parameter of the layers that were exchanged, the scales of their integers, and every parameter of one
    dimension elsewhere: norms and biases.
    """
    layers, seen = stored_layers(model), set[int]()
    inside = tuple(f"{name}." for name in layers)
    packed = {id(layer.weight_scale) for layer in packed_layers(model)}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        scale = id(tensor) in packed
        taken = scale or (isinstance(tensor, nn.Parameter) and (tensor.ndim == 1 or name.startswith(inside)))
        if taken and id(tensor) not in seen and bool(tensor.count_nonzero()):
            seen.add(id(tensor))
            yield Number.of(name, tensor, each=scale)
