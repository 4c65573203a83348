"""Hooks that add what every linear reads to running sums."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from spectrim.calibrate.moments import Sums
from spectrim.calibrate.positions import Positions
from spectrim.errors import ModelError, NumericalError
from spectrim.linear import Linear


def given(args: tuple[torch.Tensor, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What a linear was called with, by position or by name."""
    x: torch.Tensor = args[0] if args else kwargs["input"]
    return x


@dataclass(frozen=True)
class _LastInput:
    """The input that the last linear read, held so that no other tensor can take its memory meanwhile."""

    owner: str
    x: torch.Tensor
    version: int

    def is_of(self, x: torch.Tensor) -> bool:
        """Is ``x`` this input: the same memory, seen the same way, unwritten since?"""
        same_memory = x.data_ptr() == self.x.data_ptr() and x.device == self.x.device
        same_view = x.shape == self.x.shape and x.stride() == self.x.stride() and x.dtype == self.x.dtype
        return same_memory and same_view and x._version == self.version


class Hooked:
    """A context in which the linears of a model carry hooks; subclasses say which, in :meth:`_hook`."""

    def __init__(self, modules: Mapping[Linear, nn.Module]) -> None:
        self._modules = modules
        self._handles: list[RemovableHandle] = []
        self._finite: list[tuple[str, torch.Tensor]] = []

    def _hook(self, linear: Linear, module: nn.Module) -> RemovableHandle:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._handles = [self._hook(linear, module) for linear, module in self._modules.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def finish(self, where: str) -> None:
        """Close a batch or a sample after its last pass.

        Raises:
            NumericalError: something was NaN or infinite; names the first such linear and ``where``.
        """
        for name, finite in self._finite:  # read only now, so that the host never waits for the device inside a pass
            if not finite:
                raise NumericalError(
                    f"NaN or infinity in {name} at {where}; check the weights, or load the model in bfloat16 or float32"
                )


class Watch(Hooked):
    """Watches the linears of a model while one batch runs through it.

    Linears that read the very input of the linear before them share its moment: which ones do is found when each first
    runs, kept in ``Sums.owners``, and checked at every later batch.

    Args:
        modules: the linears and their modules.
        sums: grows by this batch.
        counted: the positions of this batch that count.
    """

    def __init__(self, modules: Mapping[Linear, nn.Module], sums: Sums, counted: Positions) -> None:
        super().__init__(modules)
        self._sums, self._counted = sums, counted
        self._last: _LastInput | None = None

    def _hook(self, linear: Linear, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(partial(self._before, linear), with_kwargs=True)

    def _before(
        self, linear: Linear, _module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
    ) -> None:
        x = given(args, kwargs).detach()
        if x.numel() == 0 or self._owner(linear.name, x) != linear.name:  # empty: an expert that no token chose
            return
        rows = self._counted.select(linear.place, x)  # [positions, in]
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
        self._last = _LastInput(owner, x, x._version)
        return owner
