"""Refinement: a few steps of Adam on the factors of one block, towards what the dense block gives."""

from collections.abc import Sequence
from typing import Any

import torch

from spectrim.calibrate.positions import Positions
from spectrim.compensate.streams import Pass
from spectrim.compensate.units import Unit
from spectrim.disk.overflow import Overflow
from spectrim.errors import NumericalError
from spectrim.maths.roots import OutputRoot, wide
from spectrim.storage import StoredLayer

RATE = 1e-3  # of Adam, as a share of the root mean square of each factor; falls to zero by half a cosine


def refine(
    unit: Unit,
    samples: Sequence[tuple[Pass, Pass, Positions]],
    steps: int,
    overflow: Overflow,
    outputs: Sequence[Any] = (),
    output: OutputRoot | None = None,
) -> None:
    """Bring a block's output nearer to the dense block's: ``E‖L (y − y')‖²`` over the positions that count.

    y is the output of the dense block on the dense model's stream, y' that of the compressed block on the compressed
    model's, so that the block also makes up for those before it. Batches take turns. Factors are changed in place;
    float32 copies hold what lower precision would round away.

    Args:
        unit: a block whose linears are solved.
        samples: the passes through the dense and the compressed model that wait at it, and the positions that count,
            by batch.
        steps: of Adam; 0 changes nothing.
        overflow: where outputs of the dense block wait for their turn.
        outputs: these outputs by batch, where they are at hand.
        output: the metric of the block's output, such as that of its last linear before the residual stream; None for
            the identity.

    Raises:
        NumericalError: the error is not finite; names the block.
    """
    place = next(iter(unit.linears.values())).place
    parameters = [p for layer in refined(unit).values() for p in layer.trained()]
    if not parameters:
        return
    masters = [parameter.detach().float().clone() for parameter in parameters]
    groups = [{"params": [m], "lr": RATE * float(m.square().mean().sqrt())} for m in masters]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    targets = []
    for number, (dense, _, counted) in enumerate(samples[:steps]):
        if outputs:
            target = _rows(outputs[number], counted, place)
        else:
            with dense.awake() as call:
                target = _rows(unit.run(call, small=False), counted, place)
            overflow.rest((unit.name, number), [target])
        targets.append(target)
    frozen = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step in range(steps):
            number = step % len(samples)
            (_, small, counted), target = samples[number], targets[number]
            with overflow.awake((unit.name, number)), small.awake() as call, torch.enable_grad():
                missing = target - _rows(unit.run(call, small=True), counted, place)
                if output is not None:
                    missing = output.times(missing.T.double()).float()
                error = missing.square().sum() / max(len(target), 1)
                if not bool(error.isfinite()):
                    raise NumericalError(f"the refinement of {unit.name} is not finite; set compensate.refine=0")
                if not error.requires_grad:  # this batch reaches none of the factors
                    continue
                gradients = torch.autograd.grad(error, parameters, allow_unused=True)  # of unchosen experts
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = None if gradient is None else gradient.float()
            optimizer.step()
            schedule.step()
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.data.copy_(master)
    finally:
        for number in range(len(targets)):
            overflow.forget((unit.name, number))
        for parameter, state in zip(parameters, frozen, strict=True):
            parameter.requires_grad_(state)


def refined(unit: Unit) -> dict[str, StoredLayer]:
    """Those of its compressed linears that store parameters; integers stay what they are."""
    return {name: layer for name, layer in unit.small.items() if layer.trained()}


def _rows(output: Any, counted: Positions, place: Any) -> torch.Tensor:
    """The positions of a block's output that count, [positions, width]."""
    return wide(counted.select(place, output[0] if isinstance(output, tuple) else output))
