"""Tensors that wait on disk for as long as a process runs."""

import ctypes
import tempfile
import weakref
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch


class Shelf:
    """Tensors by key, or bare bytes, in a file without a name, which the system removes when the process ends, however
    that ends.

    Args:
        directory: on the disk that has room.

    Raises OSError where it cannot be written or read.
    """

    def __init__(self, directory: Path) -> None:
        self._file: Any = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - open for as long as the shelf is
        weakref.finalize(self, self._file.close)
        self._kept: dict[Hashable, tuple[int, torch.Tensor]] = {}

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep a tensor; one that was kept under this key is forgotten."""
        whole = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._kept[key] = self.write(whole.untyped_storage()), whole.to("meta")

    def get(self, key: Hashable) -> torch.Tensor | None:
        """The tensor of that key, bit for bit, on the CPU; None where there is none."""
        if key not in self._kept:
            return None
        at, like = self._kept[key]
        found = torch.empty_like(like, device="cpu")
        self.read(found.untyped_storage(), at)
        return found

    def write(self, storage: torch.UntypedStorage, at: int | None = None) -> int:
        """Write the bytes of a storage at a place, else at the end; returns the place."""
        place = self._file.seek(0, 2) if at is None else self._file.seek(at)
        self._file.write(_bytes(home := storage.cpu()))  # held until it is written
        self._file.flush()
        del home
        return int(place)

    def read(self, storage: torch.UntypedStorage, at: int) -> None:
        """Fill a storage with the bytes that were written at a place."""
        home = storage if storage.device.type == "cpu" else torch.UntypedStorage(storage.nbytes())
        self._file.seek(at)
        if self._file.readinto(_bytes(home)) != home.nbytes():
            raise OSError("the file has become shorter")
        if home is not storage:
            storage.copy_(home)

    def close(self) -> None:
        """Give the room back."""
        self._file.close()


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    """The memory of a storage on the CPU; numpy would keep it from ever being emptied."""
    if not storage.nbytes():
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
