"""Models that are larger than their memory: blocks stay in the safetensors files and come in when they run."""

import logging
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from spectrim.anatomy import anatomy
from spectrim.away import keep_away
from spectrim.calibrate.memory import limit_bytes
from spectrim.checkpoint.weights import loaded_bytes, weight_files
from spectrim.disk.shelf import Shelf
from spectrim.errors import StatisticsError
from spectrim.estimate import amount

_log = logging.getLogger(__name__)
_SHARE = 0.5  # of the memory that weights may take before blocks stay on disk


def too_large(directory: Path, memory: str, dtype: torch.dtype | None) -> bool:
    """Whether the weights of a directory take more than half of the memory in a dtype; None for that of its files."""
    return loaded_bytes(weight_files(directory), dtype) > _SHARE * limit_bytes(memory, torch.device("cpu"))


def places(empty: PreTrainedModel) -> dict[str, str]:
    """Where the parts of a model go, as a ``device_map``: blocks on disk, all else in memory.

    Args:
        empty: the model on the meta device.
    """
    blocks = anatomy(empty).blocks()
    found = dict.fromkeys(blocks, "disk")
    inside = tuple(f"{name}." for name in blocks)
    for name, module in empty.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and name not in found and not name.startswith(inside):
            found[name] = "cpu"
    kept = sum(x.nbytes for name, x in empty.named_parameters() if not name.startswith(inside))
    _log.info("%d blocks stay in their files; %s of weights are in memory", len(blocks), amount(kept))
    return found


class _Kept(Mapping[str, torch.Tensor]):
    """The tensors of a layer by name, each read from a shelf whenever it is asked for."""

    def __init__(self, layer: nn.Module, shelf: Shelf) -> None:
        self._names, self._shelf = [*layer.state_dict()], shelf
        for name, tensor in layer.state_dict().items():
            shelf.put((id(self), name), tensor)

    def __getitem__(self, name: str) -> torch.Tensor:
        if (found := self._shelf.get((id(self), name))) is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def put_away(layer: nn.Module, shelf: Shelf) -> None:
    """Move the tensors of a layer to a shelf, from where they come in when it runs or is saved.

    Raises:
        StatisticsError: there is no room for them.
    """
    device = next(chain(layer.parameters(), layer.buffers())).device
    try:
        kept = _Kept(layer, shelf)
    except OSError as error:
        raise StatisticsError(
            f"there is no room for compressed layers beside the spectra ({error}); make room"
        ) from error
    keep_away(layer, kept, device)
