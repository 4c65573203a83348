"""Where forward passes can end: behind the last block whose linears are wanted, and before the vocabulary."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from torch import nn
from transformers import PreTrainedModel

from spectrim.linear import Linear


class EndError(BaseException):
    """Ends a forward pass; no error handler of the model's may catch it."""


def stations(model: PreTrainedModel, linears: Iterable[Linear]) -> dict[str, nn.Module]:
    """What a forward pass goes through, by name: the blocks of these linears, and those that are in none."""
    return {name: model.get_submodule(name) for name in {x.block or x.name for x in linears}}


class Route:
    """The way of forward passes through the blocks of a model, as the first pass finds it.

    Args:
        model: with these blocks.
        linears: all that can be compressed; those outside blocks are stations of their own.
    """

    def __init__(self, model: PreTrainedModel, linears: Iterable[Linear]) -> None:
        self._stations = stations(model, linears)
        head = model.get_output_embeddings()
        # On a CPU a product of bfloat16 rows that are not contiguous with the vocabulary takes seconds.
        self._head = None if head in self._stations.values() else head
        self._way: list[str] | None = None

    @contextmanager
    def followed(self, wanted: Iterable[Linear]) -> Iterator[None]:
        """A forward pass inside the block ends behind the last of these linears, if it goes the way of the first.

        The first one goes on until the product with the vocabulary.
        """
        passed: list[str] = []
        needed = {x.block or x.name for x in wanted}
        way = self._way or []
        end = 1 + max((number for number, name in enumerate(way) if name in needed), default=-1)

        def enter(name: str) -> None:
            if way and passed == way[:end]:
                raise EndError
            passed.append(name)

        def leave(*_: object) -> None:
            raise EndError

        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: enter(name))
            for name, module in self._stations.items()
        ]
        if self._head is not None:
            hooks.append(self._head.register_forward_pre_hook(leave))
        try:
            with suppress(EndError):
                yield
        finally:
            for hook in hooks:
                hook.remove()
        self._way = self._way or passed
