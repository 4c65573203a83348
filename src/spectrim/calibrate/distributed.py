"""Calibration over the processes of torch.distributed: disjoint batches, one sum."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.moments import Sums
from spectrim.errors import ModelError
from spectrim.linear import Linear
from spectrim.maths.sums import Gram, few_rows


@contextmanager
def joined(device: str | None) -> Iterator[str | None]:
    """Inside the block the processes that ``torchrun`` started work together; gives the device of this one.

    Without torchrun, or where they do already, nothing changes. A CUDA device without a number becomes that of the
    process on its machine.
    """
    if not distributed.is_torchelastic_launched() or distributed.is_initialized():
        yield device
        return
    cuda = device is not None and torch.device(device).type == "cuda"
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def share() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def least(value: int) -> int:
    """The least of the values of all processes, in each of them."""
    if share()[1] == 1:
        return value
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return int(min(values))


def reduce_sums(sums: Sums, linears: Mapping[str, Linear], forms: Mapping[str, CurvatureForm]) -> None:
    """Add up the sums of all processes, in place and in each of them.

    Args:
        sums: of one unit in this process.
        linears: by name.
        forms: of output moments, by linear.

    Raises:
        ModelError: the processes found different linears to share their input.
    """
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(
        states, (sums.owners, [*sums.fisher], [*sums.outputs], sums.batches, sums.samples, sums.labels)
    )
    fisher: set[str] = set()
    outputs: set[str] = set()
    sums.batches = sums.samples = sums.labels = 0
    for owners, graded, curved, batches, samples, labels in states:
        for linear, owner in owners.items():
            if sums.owners.setdefault(linear, owner) != owner:
                raise ModelError(f"{linear} shares its input with {owner} on one process only; report this model")
        fisher.update(graded)
        outputs.update(curved)
        sums.labels += labels
        sums.batches += batches
        sums.samples += samples
    for owner in sorted(set(sums.owners.values())):
        moment = sums.moment(owner, linears[owner].in_features)
        moment.count = _total(moment.count)
        _add_gram(moment.gram, moment.count)
        _add_up(moment.abs_sum)
    for name in sorted(fisher):
        _add_up(sums.fisher_columns(name, linears[name].in_features))
    for name in sorted(outputs):
        output = sums.output(linears[name], forms[name])
        output.count = _total(output.count)
        for value in (*output.held.values(), output.traces):
            if isinstance(value, Gram):
                _add_gram(value, output.count)
            else:
                _add_up(value)


def _add_gram(gram: Gram, count: int) -> None:
    """Add up the `count` rows of all processes; they stay rows where they are few, in the order of the processes."""
    if count > few_rows(gram.width):
        _add_up(*gram.sum())
        return
    assert gram.rows is not None
    rows: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(rows, gram.rows.cpu())  # each process has a device of its own
    gram.hold(rows)


def _total(count: int) -> int:
    tensor = torch.tensor([count])
    _add_up(tensor)
    return int(tensor)


def _add_up(*tensors: torch.Tensor) -> None:
    """All-reduce in place; with NCCL, which knows no host memory, on the current accelerator."""
    for tensor in tensors:
        if distributed.get_backend() == "nccl" and not tensor.is_cuda:
            moved = tensor.cuda()
            distributed.all_reduce(moved)
            tensor.copy_(moved)
        else:
            distributed.all_reduce(tensor)
