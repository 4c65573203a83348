"""One forward pass of a checkpoint that was just written, against the model in memory."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from spectrim.errors import CheckpointError, first_line
from spectrim.storage.runtime import set_runtime
from spectrim.trace import quiet

logger = logging.getLogger("spectrim")

Inputs = Mapping[str, torch.Tensor]

# Relative differences that no rounding explains. From a tenth of them on they are one line of logging: other kernels,
# other orders of sums, buffers outside the checkpoint that `model.half()` rounded, near ties of a router.
_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.25}


_SKIPPED = "the checkpoint is not compared with the model in memory: %s"


def runnable(model: PreTrainedModel, samples: Sequence[Inputs]) -> list[Inputs]:
    """Those samples that `model` runs on; the others are one line of logging."""
    found = []
    for inputs in samples:
        try:
            _output(model, inputs)
        except Exception as error:  # whatever the code of a model may raise
            logger.warning(_SKIPPED, first_line(error))
        else:
            found.append(inputs)
    return found


@torch.no_grad()
def check_written(model: PreTrainedModel, directory: Path, samples: Sequence[Inputs]) -> None:
    """Load the checkpoint in `directory` beside `model`, and compare the tensors, and what both make of short samples.

    `samples` are some that the dense model runs on. Skipped, with a line of logging, where memory holds no second copy
    or the model is spread over several places. Raises CheckpointError where the compressed model does not run, the
    checkpoint does not load, its tensors are others, or the outputs differ by more than rounding can; names the first
    module that differs. What may be rounding, and a model whose outputs change from run to run, are one line of
    logging.
    """
    if not samples:
        return
    doing = "the compressed model does not run"
    try:
        for inputs in samples:
            _output(model, inputs)
        if obstacle := _obstacle(model):
            logger.warning(_SKIPPED, obstacle)
            return
        doing = "the checkpoint would not load again"
        again: Any = type(model).from_pretrained(
            directory,
            dtype="auto",
            device_map=None if model.device.type == "cpu" else {"": model.device},
            attn_implementation=model.config._attn_implementation,
        )
        set_runtime(again, "reference")  # kernels round in other places than the model in memory
        if name := _other_tensor(model, again):
            raise CheckpointError(
                f"the checkpoint loads other tensors than the model in memory has, first in {name!r}; nothing was "
                "written: keep that module dense"
            )
        for inputs in samples:
            _compare(model, again, inputs)
    except CheckpointError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        logger.warning(_SKIPPED, first_line(error))
    except Exception as error:  # whatever the code of a model may raise
        raise CheckpointError(
            f"{doing} ({first_line(error)}); nothing was written: "
            "keep the layers dense that the model's own code handles"
        ) from error


def _obstacle(model: PreTrainedModel) -> str | None:
    """Why a second copy of a model cannot stand beside it; None where it can."""
    tensors = [*model.parameters(), *model.buffers()]
    if len({tensor.device for tensor in tensors}) > 1 or any(tensor.is_meta for tensor in tensors):
        return "it is spread over several places"
    free = psutil.virtual_memory().available
    size = sum(tensor.nbytes for tensor in tensors)
    return "memory holds no second copy" if model.device.type == "cpu" and size > free else None


def _other_tensor(model: PreTrainedModel, again: PreTrainedModel) -> str | None:
    """Name of the first module with a tensor that is another one in the copy; None where all are the same."""
    copies = again.state_dict()
    for name, tensor in model.state_dict().items():
        copy = copies.get(name)
        if copy is not None and not torch.equal(tensor := tensor.to(copy.dtype), copy) and _beyond(tensor, copy, 1):
            return name.rpartition(".")[0]
    return None


def _compare(model: PreTrainedModel, again: PreTrainedModel, inputs: Inputs) -> None:
    """Raise or log where two models with the same tensors make different outputs of a sample."""
    output, other = _output(model, inputs), _output(again, inputs)
    if not _beyond(output, other, 0.1):
        return
    if _beyond(output, _output(model, inputs), 0.1):
        logger.warning(_SKIPPED, "its outputs change from run to run")
        return
    first = _first_difference(model, again, inputs)
    if _beyond(output, other, 1):
        raise CheckpointError(
            f"the checkpoint computes something else than the model in memory, first in {first!r}, though all tensors "
            "are the same; nothing was written: compress the model as from_pretrained loads it, or keep that module "
            "dense"
        )
    logger.warning(
        "outputs of the checkpoint and of the model in memory differ by %.2g, first in %r; all tensors are the same",
        _difference(output, other),
        first,
    )


def _output(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """What the model makes of a sample; whatever random numbers it draws, the next call draws the same."""
    with quiet(model), torch.no_grad():
        return _tensor(model(**{name: value.to(model.device) for name, value in inputs.items()}))


def _tensor(output: Any) -> torch.Tensor:
    """The first tensor of a module's output, on the CPU; empty where there is none."""
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values()), None))
    while isinstance(output, list | tuple) and output:
        output = output[0]
    return output.detach().cpu() if isinstance(output, torch.Tensor) else torch.empty(0)


def _beyond(a: torch.Tensor, b: torch.Tensor, share: float) -> bool:
    """Whether two tensors differ by more than a share of what no rounding explains."""
    limits = [_LIMITS.get(x.dtype, 0.0) for x in (a, b)]
    return _difference(a, b) > share * max(limits)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative difference of two tensors; infinite where their shapes or their infinities and NaNs differ."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    size, apart = a[finite].norm(), (a - b)[finite].norm()
    return float(apart / size) if size > 0 else float(apart)


def _first_difference(model: PreTrainedModel, again: PreTrainedModel, inputs: Inputs) -> str:
    """Name of the module, by the order in which they finish, whose output is the first to differ."""
    with _recorded(model) as before:
        _output(model, inputs)
    with _recorded(again) as after:
        _output(again, inputs)
    names = [name for name in before if name not in after or _beyond(before[name], after[name], 0.1)]
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
