"""Hooks that add what every linear reads, and what its weight's gradient is, to running sums."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from spectrim.anatomy import Linear
from spectrim.calibrate.moments import Sums, wide
from spectrim.calibrate.positions import Positions
from spectrim.errors import ModelError, NumericalError


@dataclass(frozen=True)
class _Reading:
    """The input that the last linear read, held so that no other tensor can take its memory meanwhile."""

    owner: str
    x: torch.Tensor
    version: int

    def is_of(self, x: torch.Tensor) -> bool:
        """Is ``x`` this input: the same memory, seen the same way, unwritten since?"""
        same_memory = x.data_ptr() == self.x.data_ptr() and x.device == self.x.device
        same_view = x.shape == self.x.shape and x.stride() == self.x.stride() and x.dtype == self.x.dtype
        return same_memory and same_view and x._version == self.version


class Watch:
    """Watches the linears of a model while one batch runs through it, and the backward pass where one is asked for.

    Linears that read the very input of the linear before them share its moment: which ones do is found when each first
    runs, kept in ``Sums.owners``, and checked at every later batch.

    Args:
        modules: the linears and their modules.
        sums: grows by this batch.
        counted: the positions of this batch that count.
        gradient_scale: gather weight gradients as well, multiplied by this; the batch must be one sample.
    """

    def __init__(
        self,
        modules: Mapping[Linear, nn.Module],
        sums: Sums,
        counted: Positions,
        *,
        gradient_scale: float | None = None,
    ) -> None:
        self._modules, self._sums, self._counted, self._scale = modules, sums, counted, gradient_scale
        self._handles: list[RemovableHandle] = []
        self._last: _Reading | None = None
        self._finite: list[tuple[str, torch.Tensor]] = []
        self._calls: Counter[str] = Counter()
        self._parts: dict[str, torch.Tensor] = {}

    def __enter__(self) -> "Watch":
        for linear, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(partial(self._before, linear)))
            if self._scale is not None:
                self._handles.append(module.register_forward_hook(partial(self._after, linear.name, self._scale)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None

    def finish(self, batch: str) -> None:
        """Close the batch after its last pass.

        Raises:
            NumericalError: something was NaN or infinite; names the first such linear and ``batch``.
        """
        for name, gradient in self._parts.items():
            self._square(name, gradient)
        self._parts = {}
        for name, finite in self._finite:  # read only now, so that the host never waits for the device inside a pass
            if not finite:
                raise NumericalError(
                    f"NaN or infinity in {name} at {batch}; check the weights, or load the model in bfloat16 or float32"
                )

    def _before(self, linear: Linear, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach()
        if x.numel() == 0 or self._owner(linear.name, x) != linear.name:  # empty: an expert that no token chose
            return
        mask = self._counted.rows(linear.place, x.shape[:-1])
        rows = x.reshape(-1, x.shape[-1])  # [positions, in]
        if mask is not None:
            rows = rows[mask.to(rows.device)]
        finite = self._sums.moment(linear.name, linear.in_features).add(rows)
        self._finite.append((f"the input of {linear.name}", finite))

    def _owner(self, name: str, x: torch.Tensor) -> str:
        shared = self._last.owner if self._last is not None and self._last.is_of(x) else None
        owner = self._sums.owners.setdefault(name, shared or name)
        if owner not in (name, shared):
            raise ModelError(
                f"{name} read the same input as {owner} in the first batch and another one now, so that they cannot "
                "share a moment; report this model"
            )
        self._last = _Reading(owner, x, x._version)
        return owner

    def _after(
        self, name: str, scale: float, _module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        if not output.requires_grad:
            output.requires_grad_()  # the parameters are frozen: the graph begins at the first linears
        self._calls[name] += 1
        output.register_hook(partial(self._backward, name, scale, args[0].detach()))

    def _backward(self, name: str, scale: float, x: torch.Tensor, g: torch.Tensor) -> None:
        """One call's part of a weight gradient, from the input ``x`` and the gradient ``g`` at the output."""
        gradient = wide(g.reshape(-1, g.shape[-1])).T @ wide(x.reshape(-1, x.shape[-1])) * scale  # [out, in]
        if self._calls[name] == 1:
            self._square(name, gradient)
        else:  # a linear that runs several times: its parts add up before they are squared
            self._parts[name] = self._parts[name] + gradient if name in self._parts else gradient

    def _square(self, name: str, gradient: torch.Tensor) -> None:
        self._finite.append((f"the gradient of {name}", self._sums.add_fisher(name, gradient)))
