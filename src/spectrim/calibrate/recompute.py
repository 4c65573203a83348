"""Blocks that are run again in the backward pass, from what they were called with (activation checkpointing)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from spectrim.forwards import forwards


class Boundaries:
    """The tensors that blocks were called with in one forward pass, and their versions then."""

    def __init__(self) -> None:
        self._seen: list[tuple[torch.Tensor, int]] = []

    def add(self, *values: Any) -> None:
        """Keep the tensors among what a block is called with."""
        self._seen += [(x, x._version) for x in tree_leaves(values) if isinstance(x, torch.Tensor)]

    def written(self) -> bool:
        """Whether the model has written into one since, so that a block run again would read something else."""
        return any(x._version != version for x, version in self._seen)


@contextmanager
def recomputing(
    blocks: Mapping[str, nn.Module], again: Callable[[], AbstractContextManager[None]]
) -> Iterator[Boundaries]:
    """Inside the block, a forward pass keeps of these modules what they are called with and no graph.

    Their graphs are made again, one at a time, in the backward pass, inside `again`.
    """
    boundaries = Boundaries()

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            boundaries.add(args, kwargs)
            ran = False

            def body(*args: Any, **kwargs: Any) -> Any:
                nonlocal ran
                if not ran:
                    ran = True
                    return forward(*args, **kwargs)
                with again():
                    return forward(*args, **kwargs)

            how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "early_stop": False}
            return checkpoint(body, *args, **how, **kwargs)  # an early stop would cut off hooks

        return run

    with forwards({module: wrapped(module.forward) for module in blocks.values()}):
        yield boundaries
