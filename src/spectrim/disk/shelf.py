"""Tensors that wait on disk for as long as a process runs."""

import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch


class Shelf:
    """Tensors by key in a file without a name, which the system removes when the process ends, however that ends.

    Args:
        directory: on the disk that has room.

    Raises OSError where it cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._file: Any = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - open for as long as the shelf is
        self._kept: dict[Hashable, tuple[int, torch.Tensor]] = {}

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep a tensor; one that was kept under this key is forgotten."""
        at = self._file.seek(0, 2)
        self._file.write(_bytes(tensor.detach().contiguous().cpu()))
        self._kept[key] = at, torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)

    def get(self, key: Hashable) -> torch.Tensor | None:
        """The tensor of that key, bit for bit, on the CPU; None where there is none."""
        if key not in self._kept:
            return None
        at, like = self._kept[key]
        self._file.seek(at)
        found = torch.empty_like(like, device="cpu")
        self._file.readinto(_bytes(found))
        return found

    def close(self) -> None:
        """Give the room back."""
        self._file.close()


def _bytes(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous tensor."""
    return tensor.flatten().view(torch.uint8).numpy()
