"""Divergences of a compressed model's predictions from the dense model's, and their gradients.

Where output heads alone predict, they run over some positions at a time: nothing as long as the vocabulary is held for
all of them, and the head's part of a gradient is done before the next positions have theirs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from spectrim.tune.samples import Sample, predicted, read

ROWS = 128  # positions whose predictions are held at once; fewer or more take longer on a CPU

Gradients = Sequence[torch.Tensor | None]


@contextmanager
def rough_products() -> Iterator[None]:
    """Products of float32 may be of bfloat16 inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def divergence(dense: PreTrainedModel, small: PreTrainedModel, part: Sample) -> float:
    """Sum at the labelled positions, nats. Raises NumericalError where it is not finite."""
    with torch.no_grad():
        if part.states is None:
            return float(_whole(dense, small, part))
        rows = zip(read(small, part.labelled).split(ROWS), part.states.split(ROWS), strict=True)
        return sum(float(_of_heads(dense, small, *pair)) for pair in rows)


def gradients(
    dense: PreTrainedModel, small: PreTrainedModel, part: Sample, wanted: Sequence[torch.Tensor]
) -> Iterator[Gradients]:
    """Gradients of that sum, by tensor `wanted`, in summands; None where a tensor had no part in it.

    Raises:
        NumericalError: the sum is not finite.
    """
    if part.states is None:
        yield torch.autograd.grad(_whole(dense, small, part), wanted, allow_unused=True)
        return
    found, behind = read(small, part.labelled), []
    for mine, theirs in zip(found.split(ROWS), part.states.split(ROWS), strict=True):
        rows = mine.detach().requires_grad_(True)
        loss = _of_heads(dense, small, rows, theirs)
        own, *others = torch.autograd.grad(loss, (rows, *wanted), allow_unused=True)
        behind.append(own)
        yield others  # of a head's bias
    yield torch.autograd.grad(found, wanted, torch.cat(behind), allow_unused=True)


def _whole(dense: PreTrainedModel, small: PreTrainedModel, part: Sample) -> torch.Tensor:
    with torch.no_grad():
        target = predicted(dense, part.labelled).float().log_softmax(-1)
    return _between(predicted(small, part.labelled), target)


def _of_heads(dense: PreTrainedModel, small: PreTrainedModel, mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    mine_head: Any = small.get_output_embeddings()
    their_head: Any = dense.get_output_embeddings()
    with torch.no_grad():
        target = their_head(theirs).float().log_softmax(-1)
    return _between(mine_head(mine), target)


def _between(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Σ KL of predictions [rows, vocabulary]: logits, and the log-probabilities float32 that are wanted."""
    return kl_div(logits.float().log_softmax(-1), target, reduction="sum", log_target=True)
