"""Gradient passes that begin where the one before them ended, so that no pass runs what lies behind its linears.

Passes go from the last blocks to the first. A pass keeps, for each batch, the gradient at the output of the block that
comes before its own; the next pass ends behind that block and goes back from there. Nothing of it may get past that
output: what else leads from earlier linears to the logits (features that skip blocks, keys that later blocks read) is
found in the graph of one sample, and such blocks hand nothing over.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node
from transformers import PreTrainedModel

from spectrim.calibrate.recompute import recomputing
from spectrim.calibrate.route import EndError, stations
from spectrim.disk.shelf import Shelf
from spectrim.errors import ModelError, StatisticsError
from spectrim.linear import Linear

Key = tuple[int, int]  # the number of a batch's first sample, and how many it has


@dataclass
class Leg:
    """Where the forward pass of one batch ended, and the gradient there; None where it went on to the logits."""

    output: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


class Relay:
    """What the gradient passes of one modality hand over.

    Args:
        model: prepared.
        linears: all that can be compressed; those outside blocks are stations of their own, and hand nothing over.
        directory: where gradients wait, in a file without a name.
    """

    def __init__(self, model: PreTrainedModel, linears: Iterable[Linear], directory: Path) -> None:
        self._model, self._linears, self._directory = model, [*linears], directory
        self._stations = stations(model, self._linears)
        self._way: list[str] | None = None  # stations in the order in which a sample passes them
        self._places: list[int] = []  # those whose output hands all over
        self._shelves: dict[int, Shelf] = {}
        self._pass: tuple[Collection[Linear], Collection[Linear]] | None = None  # that begins
        self._end: int | None = None
        self._keep: int | None = None

    def start(self, wanted: Collection[Linear], after: Collection[Linear]) -> None:
        """A pass over the samples begins, for the linears `wanted`; the next is for those of `after`, if any."""
        self._pass = wanted, after

    def ready(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """To be called before a batch with its inputs, when nobody watches the model yet: the first one explores it."""
        if self._way is None:
            self._explore(inputs)
        if self._pass is not None:
            self._arrange(*self._pass)
            self._pass = None

    @contextmanager
    def leg(self, key: Key) -> Iterator[Leg]:
        """A forward pass of a batch inside the block ends where its gradients wait, if it goes the way of the first."""
        found, passed = Leg(), list[str]()
        waiting = None if self._end is None else self._shelves[self._end].get(key)

        def leave(name: str, _module: nn.Module, _args: Any, output: Any) -> Any:
            assert self._way is not None
            passed.append(name)
            place, tensor = len(passed) - 1, _first(output)
            if passed != self._way[: len(passed)] or tensor is None:
                return None
            if waiting is not None and place == self._end:
                found.output, found.gradient = tensor, waiting.to(tensor.device)
                raise EndError
            if place != self._keep:
                return None
            if not tensor.requires_grad:
                tensor.requires_grad_()
            tensor.register_hook(partial(self._kept, place, key))
            return _replaced(output, tensor.clone())  # the model may write into it

        with self._hooks(leave), suppress(EndError):
            yield found

    def _arrange(self, wanted: Collection[Linear], after: Collection[Linear]) -> None:
        """Where batches of this pass end, and where they leave gradients for the next one."""
        ends = sorted(place for place in self._shelves if place >= self._last(wanted))
        self._end = ends[0] if ends else None
        self._keep = next((place for place in self._places if after and place >= self._last(after)), None)
        for place in {*self._shelves} - {self._end}:
            self._shelves.pop(place).close()
        if self._keep is not None and self._keep not in self._shelves:
            try:
                self._shelves[self._keep] = Shelf(self._directory)
            except OSError as error:
                raise self._full(error) from error

    def close(self) -> None:
        """Nothing is handed over any more."""
        for shelf in self._shelves.values():
            shelf.close()
        self._shelves.clear()

    def _kept(self, place: int, key: Key, gradient: torch.Tensor) -> None:
        try:
            self._shelves[place].put(key, gradient)
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> StatisticsError:
        return StatisticsError(
            f"{self._directory} cannot be written ({error}); make room or choose another output directory"
        )

    def _last(self, linears: Iterable[Linear]) -> int:
        """Where the last of these linears has run; -1 where none does."""
        names = {x.block or x.name for x in linears}
        return max((place for place, name in enumerate(self._way or []) if name in names), default=-1)

    def _hooks(self, leave: Any) -> ExitStack:
        stack = ExitStack()
        for name, module in self._stations.items():
            stack.callback(module.register_forward_hook(partial(leave, name)).remove)
        return stack

    def _explore(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """The way of one sample, and after which blocks one tensor is all that later ones have of earlier ones."""
        way: list[str] = []
        outputs: list[tuple[Node | None, int]] = []  # of each station, and how many leaves there were by then
        leaves: dict[Any, int] = {}

        def begin(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
            if output.requires_grad:
                return None
            leaf = output.requires_grad_()
            handed = leaf.clone()
            assert handed.grad_fn is not None
            leaves[handed.grad_fn.next_functions[0][0]] = len(leaves)
            return handed

        def leave(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
            tensor = _first(output)
            way.append(name)
            outputs.append((None if tensor is None else tensor.grad_fn, len(leaves)))

        blocks = {x.block: self._stations[x.block] for x in self._linears if x.block is not None}
        with torch.enable_grad(), ExitStack() as stack:
            for x in self._linears:
                stack.callback(self._model.get_submodule(x.name).register_forward_hook(begin).remove)
            with self._hooks(leave), recomputing(blocks, nullcontext):
                logits = getattr(self._model(**inputs, use_cache=False), "logits", None)
        self._way = way
        if logits is None:  # which the pass itself will say
            return
        if logits.grad_fn is None:
            raise ModelError(
                f"{type(self._model).__name__} cannot be differentiated (no linear leads to its logits); choose a "
                "recipe that needs no gradients, such as jw-svd"
            )
        for place, (node, before) in enumerate(outputs):
            if node is not None and way[place] in blocks and way.count(way[place]) == 1:
                past = _reached(logits.grad_fn, node)
                if not any(leaf in past and number < before for leaf, number in leaves.items()):
                    self._places.append(place)


def _first(output: Any) -> torch.Tensor | None:
    """The hidden states among what a block gives."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, torch.Tensor) and first.is_floating_point() else None


def _replaced(output: Any, first: torch.Tensor) -> Any:
    """What a block gives, with other hidden states."""
    return type(output)((first, *output[1:])) if isinstance(output, tuple | list) else first


def _reached(root: Node, without: Node) -> set[Node]:
    """The nodes of a graph that gradients of its root reach where they may not pass one of them."""
    found, waiting = {without}, [root]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [n for n, _ in node.next_functions if n is not None]
    return found
