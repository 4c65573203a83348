"""Batches on their way through both models, and what one group of linears reads and gives in each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from spectrim.away import here
from spectrim.calibrate.positions import Positions
from spectrim.compensate.streams import Pass
from spectrim.compensate.tap import Tap
from spectrim.compensate.units import Group, Unit
from spectrim.errors import ModelError
from spectrim.maths.roots import wide
from spectrim.samples import Modality

Rows = tuple[Modality, torch.Tensor, dict[str, torch.Tensor]]
"""Of one batch: compressed inputs x' [positions, in] of linears that share them, and their targets [positions, out]."""


@dataclass(frozen=True)
class Pair:
    """One batch on its way through the dense and through the compressed model."""

    modality: Modality
    left_out: bool  # judges the fit, and is not fitted to
    counted: Positions
    dense: Pass
    small: Pass


def dense_taps(unit: Unit, pairs: Sequence[Pair], writers: frozenset[str], room: int) -> list[Tap]:
    """What the linears of the dense unit give for each batch, in one run; none where all of it would take too much."""
    taps: list[Tap] = []
    for pair in pairs:
        with pair.dense.awake() as call:
            taps.append(unit.tap(call, small=False, whole=True, y=unit.dense, r=writers))
        if taps[0].nbytes * len(pairs) > room:
            return []
    return taps


def rows(
    unit: Unit, group: Group, pairs: Sequence[Pair], dense: Sequence[Tap], *, left_out: bool, averaged: bool
) -> Iterator[Rows]:
    """What the linears of a group read in the compressed model and what they are to give, batch by batch.

    Batches in which some linears of the group do not run give none. Nor do experts: the compressed model may route
    other tokens to them than the dense model, whose outputs are then no targets.

    Args:
        unit: that the pairs wait at.
        group: of its linears.
        pairs: all batches.
        dense: what linears of the dense unit give for each of them, where that is at hand.
        left_out: those that judge the fit, or those that are fitted to.
        averaged: a batch is a bucket, and counts as the means of its positions.

    Raises:
        ModelError: a linear reads other positions in the compressed model.
    """
    first = group.members[0]
    place = unit.linears[first].place
    for number, pair in enumerate(pairs):
        if pair.left_out != left_out or unit.linears[first].expert is not None:
            continue
        if dense:
            wanted = dense[number]
        else:
            with pair.dense.awake() as call:
                wanted = unit.tap(call, small=False, y=group.members, r=group.writers)
        with pair.small.awake() as call:
            small = unit.tap(call, small=True, x=(first,), r=group.writers)
            if not wanted.y.keys() >= set(group.members) or first not in small.x:
                continue
            x = small.x[first]
            if pair.counted.chosen(place, x.shape[:-1]) or pair.counted.chosen(place, wanted.y[first].shape[:-1]):
                continue
            select = pair.counted.average if averaged else pair.counted.select
            targets = {}
            for name in group.members:
                output, bias = wanted.y[name], here(unit.dense[name]).bias
                if output.shape[:-1] != x.shape[:-1]:
                    raise ModelError(f"{name} reads other positions in the compressed model; set compensate.kind=none")
                target = wide(output) if bias is None else wide(output) - wide(bias)
                if name in wanted.r and name in small.r:
                    target = target + (wide(wanted.r[name]) - wide(small.r[name])).reshape(target.shape)
                targets[name] = select(place, target)
            if x.numel():
                yield pair.modality, select(place, x), targets
