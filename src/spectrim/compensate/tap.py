"""What the linears of a block read and give in one run of it, and what their outputs are added to."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from spectrim.calibrate.hooks import given

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


class _EnoughError(Exception):
    """All that was asked for has been seen."""


class Tap(TorchDispatchMode):
    """Records, by linear, ``x`` (input), ``y`` (output) and ``r``, to which y is added as it is.

    The addition is found by what it reads, not by the name of the linear: one operand is the very memory of y, the
    other is r and has its shape. It is the residual stream for output projections of most models; an output that is
    normalized, gated or scaled first has no r. The first run of a linear in the block counts. ``output`` is that of the
    block, if it ran whole. All are as they were then, whatever the block writes into them afterwards.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        x: Collection[str] = (),
        y: Collection[str] = (),
        r: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.x: dict[str, torch.Tensor] = {}
        self.y: dict[str, torch.Tensor] = {}
        self.r: dict[str, torch.Tensor] = {}
        self.output: Any = None
        self._modules, self._sums = modules, set(r)
        self._inputs, self._outputs = set(x), {*y, *r}
        self._given: dict[str, tuple[torch.Tensor, int]] = {}  # the very outputs of linears, and their versions then
        self._copies = False
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._stop = False
        self._handles: list[RemovableHandle] = []

    @property
    def nbytes(self) -> int:
        """Bytes of what was seen."""
        return sum(x.nbytes for seen in (self.x, self.y, self.r) for x in seen.values())

    def watch(self, run: Callable[[], object], *, whole: bool = False) -> "Tap":
        """Run the block until all that was asked for is there, or `whole`; what never came is missing then."""
        self._stop = not whole
        self._run(run)
        if any(seen._version != version for seen, version in self._versions):  # once more, and keep copies
            self._copies = True
            for seen in (self.x, self.y, self.r, self._given):
                seen.clear()
            self._run(run)
        self._versions.clear()
        self._given.clear()
        return self

    def _run(self, run: Callable[[], object]) -> None:
        for name, module in self._modules.items():
            if name in self._inputs:
                self._handles.append(module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            if name in self._outputs:
                self._handles.append(module.register_forward_hook(partial(self._after, name)))
        try:
            with self:
                self.output = run()
        except _EnoughError:
            pass
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._copies:
            return tensor.clone()
        self._versions.append((tensor, tensor._version))
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at additions; everything runs as it would."""
        if func in _ADDITIONS and not kwargs and self._sums - self.r.keys():
            self._addition(func, *args[:2])
        return func(*args, **(kwargs or {}))

    def _before(self, name: str, _module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        if name not in self.x:
            self.x[name] = self._kept(given(args, kwargs))
        self._check()

    def _after(self, name: str, _module: nn.Module, _args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if name not in self.y:
            self._given[name], self.y[name] = (output, output._version), self._kept(output)
        self._check()

    def _addition(self, func: Any, left: Any, right: Any) -> None:
        if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor) or left.shape != right.shape:
            return
        for name in self._sums & (self.y.keys() - self.r.keys()):
            y, version = self._given[name]
            if y._version != version:  # scaled in place, for instance
                continue
            for one, other in ((left, right), (right, left)):
                if one.data_ptr() == y.data_ptr() and one.numel() == y.numel() and one.is_contiguous():
                    self.r[name] = other.clone() if func is _ADDITIONS[1] else self._kept(other)  # which writes over it
                    self._check()
                    return

    def _check(self) -> None:
        here = (self._inputs <= self.x.keys(), self._outputs <= self.y.keys(), self._sums <= self.r.keys())
        if self._stop and all(here):
            raise _EnoughError
