"""The units of a model that are solved one after the other: its blocks, and the linears outside blocks."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.calibrate.hooks import given
from spectrim.compensate.streams import Call
from spectrim.compensate.tap import Tap
from spectrim.linear import Linear
from spectrim.plan.plan import Plan
from spectrim.storage import Tensors, filled


@dataclass(frozen=True)
class Group:
    """Linears that read one input; ``writers`` are those whose output is added to something as it is."""

    members: tuple[str, ...]
    writers: frozenset[str]


class Unit:
    """A block, or a linear outside blocks, that can run dense or with those linears compressed that are ``small``."""

    def __init__(self, model: PreTrainedModel, name: str, linears: Sequence[Linear]) -> None:
        self.name, self.linears = name, {linear.name: linear for linear in linears}
        self.module = model.get_submodule(name)
        self.dense: dict[str, Any] = {linear.name: model.get_submodule(linear.name) for linear in linears}
        self.small: dict[str, Any] = {}
        self._model = model
        self._forward: Callable[..., Any] = self.module.forward

    def compress(self, plan: Plan, solved: Mapping[str, Tensors]) -> None:
        """Add compressed linears, by name and with their stored tensors."""
        for name, tensors in solved.items():
            row = plan.linears[name]
            self.small[name] = filled(self.dense[name], row.form, row.spec, tensors)

    def run(self, call: Call, *, small: bool) -> Any:
        """The output of the unit, dense or with its compressed linears in place."""
        if self.name in self.dense:
            return (self.small[self.name] if small and self.small else self._forward)(*call.args, **call.kwargs)
        with self._in_place(small):
            return self._run(call)

    def tap(self, call: Call, *, small: bool, whole: bool = False, **wanted: Collection[str]) -> Tap:
        """Run it as far as what is wanted of its linears (see :class:`Tap`)."""
        if self.name in self.dense:  # nobody calls its module, so that no hook of it runs
            found = Tap({})
            found.x[self.name] = given(call.args, call.kwargs)
            if "y" in wanted:
                found.output = found.y[self.name] = self.run(call, small=small)
            return found
        with self._in_place(small):
            return Tap(self.dense, **wanted).watch(lambda: self._run(call), whole=whole)

    def groups(self, calls: Sequence[Call], *, residual: bool) -> list[Group]:
        """Its linears by input, in the order in which the dense unit runs them in any of the calls."""
        members: dict[str, list[str]] = {}  # by the first of them
        writers: set[str] = set()
        for call in calls:
            names = tuple(self.dense)
            found = self.tap(call, small=False, whole=True, x=names, r=names if residual else ())
            writers |= found.r.keys()
            owners: dict[tuple[Any, ...], str] = {}
            seen = {name for group in members.values() for name in group}
            for name, x in found.x.items():  # all are held, so that no two share memory by chance
                key = (x.data_ptr(), x.shape, x.stride(), x.dtype)
                if name not in seen:
                    members.setdefault(owners.setdefault(key, name), []).append(name)
                else:
                    owners.setdefault(key, name)
        return [Group(tuple(group), frozenset(writers & set(group))) for group in members.values()]

    def _run(self, call: Call) -> Any:
        """One run on copies: a block may write into what it is given, and runs on it again."""
        args = [x.clone() if isinstance(x, torch.Tensor) else x for x in call.args]
        kwargs = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in call.kwargs.items()}
        return self._forward(*args, **kwargs)

    @contextmanager
    def _in_place(self, small: bool) -> Iterator[None]:
        layers = self.small if small else {}
        try:
            for name, layer in layers.items():
                self._model.set_submodule(name, layer)
            yield
        finally:
            for name in layers:
                self._model.set_submodule(name, self.dense[name])
