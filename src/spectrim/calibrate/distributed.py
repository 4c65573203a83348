"""Calibration over the processes of torch.distributed: disjoint batches, one sum."""

from typing import Any

import torch
from torch import distributed

from spectrim.calibrate.moments import Sums
from spectrim.errors import ModelError


def share() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def reduce_sums(sums: Sums, widths: dict[str, int]) -> None:
    """Add up the sums of all processes, in place and in each of them.

    Args:
        sums: of this process.
        widths: linear → in_features.

    Raises:
        ModelError: the processes found different linears to share their input.
    """
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (sums.owners, sorted(sums.fisher), sums.batches, sums.samples))
    fisher: set[str] = set()
    sums.batches = sums.samples = 0
    for owners, graded, batches, samples in found:
        for linear, owner in owners.items():
            if sums.owners.setdefault(linear, owner) != owner:
                raise ModelError(f"{linear} shares its input with {owner} on one process only; report this model")
        fisher.update(graded)
        sums.batches += batches
        sums.samples += samples
    for owner in sorted(set(sums.owners.values())):
        moment = sums.moment(owner, widths[owner])
        count = torch.tensor([moment.count])
        for tensor in (moment.second, moment.abs_sum, count):
            _add_up(tensor)
        moment.count = int(count)
    for linear in sorted(fisher):
        columns = sums.fisher.setdefault(linear, torch.zeros(widths[linear], dtype=torch.float64, device=sums.home))
        _add_up(columns)


def _add_up(tensor: torch.Tensor) -> None:
    """All-reduce in place, by way of the current accelerator where the backend knows no other memory."""
    if distributed.get_backend() == "nccl" and not tensor.is_cuda:
        moved = tensor.cuda()
        distributed.all_reduce(moved)
        tensor.copy_(moved)
    else:
        distributed.all_reduce(tensor)
