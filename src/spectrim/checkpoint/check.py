"""One forward pass of a checkpoint that was just written, against the model in memory."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectrim.errors import CheckpointError

logger = logging.getLogger("spectrim")

Inputs = Mapping[str, torch.Tensor]

# Relative difference that other kernels or another order of sums may leave.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def check_written(model: PreTrainedModel, directory: Path, samples: Sequence[Inputs]) -> None:
    """Load the checkpoint in `directory` beside `model`, and compare what both make of some short samples.

    Skipped, with a line of logging, where the model does not run on a sample or memory holds no second copy. Raises
    CheckpointError where the checkpoint does not load, or the outputs differ; names the first module that differs.
    """
    if getattr(model, "hf_device_map", None):  # parts of it may be elsewhere
        return
    try:
        expected = [(inputs, _output(model, inputs)) for inputs in samples]
    except Exception as error:  # whatever the code of a model may raise
        logger.warning("the checkpoint was not compared with the model in memory: %s", _reason(error))
        return
    try:
        again: Any = type(model).from_pretrained(
            directory,
            dtype="auto",
            device_map=None if model.device.type == "cpu" else {"": model.device},
            attn_implementation=model.config._attn_implementation,
        )
        found = [_output(again, inputs) for inputs, _ in expected]
    except (torch.OutOfMemoryError, MemoryError) as error:
        logger.warning("the checkpoint was not compared with the model in memory: %s", _reason(error))
        return
    except Exception as error:
        raise CheckpointError(f"the checkpoint would not load again ({_reason(error)}); nothing was written") from error
    for (inputs, output), other in zip(expected, found, strict=True):
        if _differ(output, other):
            raise CheckpointError(
                f"the checkpoint computes something else than the model in memory, first in "
                f"{_first_difference(model, again, inputs)!r}; nothing was written: keep that module dense"
            )


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _output(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    training = model.training
    try:
        found = model.eval()(**{name: value.to(model.device) for name, value in inputs.items()})
    finally:
        model.train(training)
    return _tensor(found)


def _tensor(output: Any) -> torch.Tensor:
    """The first tensor of a module's output, on the CPU; empty where there is none."""
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values()), None))
    while isinstance(output, list | tuple) and output:
        output = output[0]
    return output.detach().cpu() if isinstance(output, torch.Tensor) else torch.empty(0)


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    tolerance = _TOLERANCES.get(a.dtype)
    if a.shape != b.shape or a.dtype != b.dtype:
        return True
    if tolerance is None:
        return not torch.equal(a, b)
    a, b = a.double(), b.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return True
    return bool((a - b)[finite].norm() > tolerance * a[finite].norm())


def _first_difference(model: PreTrainedModel, again: PreTrainedModel, inputs: Inputs) -> str:
    """Name of the module, by the order in which they finish, whose output is the first to differ."""
    with _recorded(model) as before:
        _output(model, inputs)
    with _recorded(again) as after:
        _output(again, inputs)
    names = [name for name in before if name not in after or _differ(before[name], after[name])]
    return next(iter(names), "") or type(model).__name__


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The outputs of all modules inside the block, by name, in the order in which they finish for the first time."""
    found: dict[str, torch.Tensor] = {}

    def record(name: str, output: Any) -> None:
        found.setdefault(name, _tensor(output))

    hooks = [
        module.register_forward_hook(lambda *call, name=name: record(name, call[-1]))
        for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
