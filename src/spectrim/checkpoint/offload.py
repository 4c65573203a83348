"""Models that are larger than their memory: blocks stay in the safetensors files and come in when they run."""

import logging
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from spectrim.anatomy import anatomy
from spectrim.calibrate.memory import limit_bytes
from spectrim.checkpoint.weights import weight_files
from spectrim.disk.nameless import Nameless, Shelved
from spectrim.errors import ModelError
from spectrim.estimate import amount
from spectrim.experts import unfused

_log = logging.getLogger(__name__)
_SHARE = 0.5  # of the memory that weights may take before blocks stay on disk


def too_large(directory: Path, memory: str) -> bool:
    """Whether the weights of a directory take more than half of the memory."""
    nbytes = sum(file.stat().st_size for file in weight_files(directory))
    return nbytes > _SHARE * limit_bytes(memory, torch.device("cpu"))


def places(empty: PreTrainedModel, memory: str) -> dict[str, str]:
    """Where the parts of a model go, as a ``device_map``: blocks on disk, all else in memory.

    Args:
        empty: the model on the meta device.
        memory: the limit, for messages.

    Raises:
        ModelError: the model cannot be read block by block from its files.
    """
    blocks = anatomy(empty).blocks()
    if any(unfused(module) for module in empty.modules()):
        raise ModelError(
            f"a model with experts is not read block by block and is larger than half of {memory}; raise the memory"
        )
    found = dict.fromkeys(blocks, "disk")
    inside = tuple(f"{name}." for name in blocks)
    for name, module in empty.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and name not in found and not name.startswith(inside):
            found[name] = "cpu"
    kept = sum(x.nbytes for name, x in empty.named_parameters() if not name.startswith(inside))
    _log.info("%d blocks stay in their files; %s of weights are in memory", len(blocks), amount(kept))
    return found


def put_away(layer: nn.Module, file: Nameless) -> None:
    """Write the tensors of a layer to a file, from where they come in when it runs or is saved.

    Raises:
        StatisticsError: there is no room for the file.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    device = next(chain(layer.parameters(), layer.buffers())).device
    kept = Shelved(layer.state_dict(), file)
    hook = AlignDevicesHook(device, offload=True, offload_buffers=True, place_submodules=True, weights_map=kept)
    add_hook_to_module(layer, hook)
