"""MLPs that may lose hidden units: linears that compute them and one that reads them, as one row of the allocation."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from spectrim.linear import Linear
from spectrim.plan.options import Menu, dense_alone
from spectrim.plan.spend import Curve
from spectrim.storage.narrow import READERS, Narrow

_log = logging.getLogger(__name__)
_COMPUTE = {"down": ("gate", "up", "gate_up"), "fc2": ("fc1",)}
assert _COMPUTE.keys() == set(READERS)


def units_of(linears: Sequence[Linear], model: nn.Module | None = None) -> dict[str, tuple[str, ...]]:
    """By a linear that reads the units of an MLP: those that compute them, one output a unit.

    All are children of one module. With a `model`, that module has no other parameters, as the norms have that some
    models put between, and its activation takes units one by one: else units would be mixed. Experts are left alone.
    """
    found: dict[str, tuple[str, ...]] = {}
    for reader in linears:
        if reader.role not in READERS or reader.expert is not None:
            continue
        home = reader.name.rpartition(".")[0]
        first = [x for x in linears if x.role in _COMPUTE[reader.role] and x.name.rpartition(".")[0] == home]
        if not first or any(x.out_features != reader.in_features for x in first):
            continue
        names = tuple(x.name for x in first)
        if model is not None:
            inside = {id(p) for name in (*names, reader.name) for p in model.get_submodule(name).parameters()}
            if any(id(p) not in inside for p in model.get_submodule(home).parameters()):
                continue
            if _mixed(model, home, first, reader):
                continue
        found[reader.name] = names
    return found


def _mixed(model: nn.Module, home: str, first: Sequence[Linear], reader: Linear) -> bool:
    """Whether a unit depends on what others are, as with Gemma 3n's activation, which keeps the largest: by trying.

    One that does not run by itself, such as one that takes more than its input, counts as mixed. One without values, on
    the meta device, cannot be tried: it counts as if it took units one by one.
    """
    mlp, modules = model.get_submodule(home), [model.get_submodule(x.name) for x in first]
    half, seen, weight = reader.in_features // 2, list[torch.Tensor](), next(modules[0].parameters())
    if weight.is_meta and not hasattr(modules[0], "_hf_hook"):
        return False
    device = "cpu" if weight.is_meta else weight.device
    x = torch.linspace(-1, 1, 2 * first[0].in_features, device=device).to(weight.dtype).view(1, 2, -1)

    def read(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(args[0] if args else named["input"])

    def others(_: nn.Module, __: Any, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([3 * y[..., :half] + 1, y[..., half:]], dim=-1)

    with ExitStack() as hooks, torch.no_grad():
        reads = model.get_submodule(reader.name)
        hooks.callback(reads.register_forward_pre_hook(read, with_kwargs=True).remove)
        try:
            mlp(x)
            for module in modules:
                hooks.callback(module.register_forward_hook(others).remove)
            mlp(x)
        except Exception as error:  # code of a model may want anything
            _log.info("%s does not run by itself (%s), so that it keeps all units", home, error)
            return True
    return len(seen) != 2 or not torch.equal(seen[0][..., half:], seen[1][..., half:])


@dataclass(frozen=True)
class _Row:
    """The linears of one MLP, the reader last; options of all of them together, [options, linears]."""

    names: tuple[str, ...]
    numbers: np.ndarray


class Units:
    """The MLPs among linears that can be narrower: those whose linears have narrow options of the same widths."""

    def __init__(self, units: Mapping[str, tuple[str, ...]], menus: Mapping[str, Menu]) -> None:
        self.menus = dict(menus)
        self._names: list[tuple[str, ...]] = []
        self._rows: list[_Row] = []
        for reader, first in units.items():
            names = (*first, reader)
            if all(name in menus for name in names):
                self._names.append(names)
            else:  # what a linear does not compute would be read
                self.menus |= {name: _as_wide(menus[name]) for name in first if name in menus}

    def joined(self, curves: Mapping[str, Curve]) -> dict[str, Curve]:
        """One curve for each MLP, by its reader; others as they are. `curves` are of `self.menus`."""
        found = dict(curves)
        for names in self._names:
            own = [found.pop(name) for name in names]
            places = [_places(self.menus[name]) for name in names]
            widths = [width for width in places[-1] if all(width in p for p in places)]
            numbers = np.concatenate([_together(own, [p[width] for p in places]) for width in widths])
            self._rows.append(_Row(names, numbers))
            pairs = list(zip(own, numbers.T, strict=True))
            size, cost = (np.sum([getattr(x, what)[n] for x, n in pairs], axis=0) for what in ("bytes", "cost"))
            found[names[-1]] = Curve(size, cost)
        return found

    def each(self, chosen: Mapping[str, int]) -> dict[str, int]:
        """The option of every linear, by number, from those of MLPs and of other linears."""
        found = dict(chosen)
        for row in self._rows:
            found |= {name: int(n) for name, n in zip(row.names, row.numbers[chosen[row.names[-1]]], strict=True)}
        return found


def _places(menu: Menu) -> dict[int | None, list[int]]:
    """Numbers of a menu's options by the width that narrow ones have; None for all others."""
    numbers, start = dict[int | None, list[int]](), 0
    for part in menu.parts:
        for n in range(len(part.bytes)):
            spec = part.spec(n) if part.form == Narrow.name else {}
            numbers.setdefault(spec.get("inputs", spec.get("outputs")), []).append(start + n)
        start += len(part.bytes)
    return numbers


def _as_wide(menu: Menu) -> Menu:
    """A menu without narrow options; the dense weight where there are no others."""
    parts = [part for part in menu.parts if part.form != Narrow.name]
    return replace(menu, parts=parts if any(len(part.bytes) for part in parts) else [dense_alone(menu.linear)])


def _together(curves: Sequence[Curve], numbers: Sequence[list[int]]) -> np.ndarray:
    """Options of linears, of these `numbers` of each, along their common lower hull, [options, linears]."""
    some = [np.asarray(n) for n in numbers]
    plain = [Curve(x.bytes[n], x.cost[n]) for x, n in zip(curves, some, strict=True)]
    steps = [curve.steps[1] for curve in plain]
    owner = np.repeat(np.arange(len(plain)), [len(scores) for scores in steps])
    order = np.argsort(-np.concatenate(steps), kind="stable")
    taken = np.cumsum(owner[order][:, None] == np.arange(len(plain)), axis=0)
    taken = np.concatenate([np.zeros((1, len(plain)), np.int64), taken])
    columns = [n[x.front[x.chain[at]]] for n, x, at in zip(some, plain, taken.T, strict=True)]
    return np.stack(columns, 1)
