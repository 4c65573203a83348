"""Bytes of tensors in a file without a name, which is gone with its process or with whoever holds it."""

import ctypes
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch

from spectrim.errors import StatisticsError


class Nameless:
    """A file in `directory` that storages are written to and read from; made when the first one is."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        self.end = 0  # bytes that the file has

    def close(self) -> None:
        """Give up the file."""
        if self._file is not None:
            self._file.close()

    def write(self, storage: torch.UntypedStorage, place: int | None = None) -> int:
        """Write its bytes at a place, else at the end; returns the place. Raises StatisticsError where that fails."""
        place = self.end if place is None else place
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 - closed by the next line
                weakref.finalize(self, self._file.close)
            self._file.seek(place)
            self._file.write(_bytes(home := storage.cpu()))
            self._file.flush()
        except OSError as error:
            raise StatisticsError(
                f"{self._directory} has no room for what the memory cannot hold ({error}); make room, or raise --memory"
            ) from error
        self.end = max(self.end, place + home.nbytes())
        return place

    def read(self, storage: torch.UntypedStorage, place: int) -> None:
        """Fill a storage with the bytes at a place. Raises StatisticsError where they cannot be read."""
        assert self._file is not None
        home = storage if storage.device.type == "cpu" else torch.UntypedStorage(storage.nbytes())
        try:
            self._file.seek(place)
            read = self._file.readinto(_bytes(home))  # type: ignore[attr-defined]
        except OSError as error:
            raise StatisticsError(f"a file in {self._directory} cannot be read ({error}); run it again") from error
        if read != home.nbytes():
            raise StatisticsError(f"a file in {self._directory} has become shorter; run it again")
        if home is not storage:
            storage.copy_(home)


class Shelved(Mapping[str, torch.Tensor]):
    """Tensors by name that were written to a nameless file; each is read whenever it is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], file: Nameless) -> None:
        self._file = file
        self._found: dict[str, tuple[torch.Tensor, int]] = {}  # one like it on the meta device, and its place
        for name, tensor in tensors.items():
            whole = tensor.detach().clone(memory_format=torch.contiguous_format)
            place = file.write(whole.untyped_storage()) if whole.numel() else 0
            self._found[name] = whole.to("meta"), place

    def __getitem__(self, name: str) -> torch.Tensor:
        like, place = self._found[name]
        tensor = torch.empty_like(like, device="cpu")
        if tensor.numel():
            self._file.read(tensor.untyped_storage(), place)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    """The very bytes of a storage on the CPU; numpy would keep it from ever being emptied."""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
