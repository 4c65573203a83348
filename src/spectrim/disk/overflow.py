"""Tensors that nobody needs for a while: in memory as far as it goes, beyond it in a file."""

import ctypes
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch

from spectrim.errors import StatisticsError


class Overflow:
    """Tensors of owners that rest, in memory up to `room` bytes of all of them and in a file beyond that.

    Bytes are moved out of the storages themselves, so that their memory is free whoever holds the tensors, and views of
    one storage stay what they are. Nobody may read a tensor whose owner rests, so one that others read, too, is to be
    left alone (see `leave`). An owner is anything that can be a key. The file is in `directory`, has no name, and is
    gone with its process.
    """

    def __init__(self, room: int, directory: Path) -> None:
        self._room, self._directory = room, directory
        self._file: IO[bytes] | None = None
        self._end = 0
        self._left: set[int] = set()  # addresses of storages
        self._free: dict[int, list[int]] = {}  # places in the file, by size
        self._inside: dict[object, int] = {}  # bytes in memory
        self._outside: dict[object, list[tuple[torch.UntypedStorage, int, int]]] = {}  # with bytes and place

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def leave(self, tensors: Iterable[torch.Tensor]) -> None:
        """Never move these, which have to stay alive, and what shares their storage."""
        self._left |= {x.untyped_storage().data_ptr() for x in tensors}

    def rest(self, owner: object, tensors: Iterable[torch.Tensor]) -> None:
        """Let the owner rest: where its tensors would be too much for the room, their bytes leave memory.

        Storages that cannot be emptied, such as those that numpy looks into, and those of which a tensor is a small
        part stay where they are.

        Raises:
            StatisticsError: the file cannot be written.
        """
        found: dict[int, torch.UntypedStorage] = {}
        for x in tensors:
            storage = x.untyped_storage()
            if storage.resizable() and 0 < storage.nbytes() <= 2 * x.nbytes:
                found[storage.data_ptr()] = storage
        held = [storage for address, storage in found.items() if address not in self._left]
        size = sum(storage.nbytes() for storage in held)
        if sum(self._inside.values()) + size <= self._room:
            self._inside[owner] = size
            return
        self._outside[owner] = [(storage, storage.nbytes(), self._write(storage)) for storage in held]
        self._empty(owner)

    def wake(self, owner: object) -> None:
        """End its rest; all bytes are in memory again. Raises StatisticsError where they cannot be read."""
        self._fill(owner)
        self.forget(owner)

    def forget(self, owner: object) -> None:
        """End its rest where nobody needs its tensors any more."""
        self._inside.pop(owner, None)
        for _, size, place in self._outside.pop(owner, ()):
            self._free.setdefault(size, []).append(place)

    @contextmanager
    def awake(self, *owners: object) -> Iterator[None]:
        """All bytes of these owners are there inside the block, which may only read them.

        Raises:
            StatisticsError: they cannot be read.
        """
        try:
            for owner in owners:
                self._fill(owner)
            yield
        finally:
            for owner in owners:
                self._empty(owner)

    def _fill(self, owner: object) -> None:
        for storage, size, place in self._outside.get(owner, ()):
            storage.resize_(size)
            self._read(storage, place)

    def _empty(self, owner: object) -> None:
        for storage, _, _ in self._outside.get(owner, ()):
            storage.resize_(0)

    def _write(self, storage: torch.UntypedStorage) -> int:
        """Write its bytes; returns their place."""
        size = storage.nbytes()
        place = found.pop() if (found := self._free.get(size)) else self._end
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 - closed by __exit__
            self._file.seek(place)
            self._file.write(_bytes(storage.cpu()))
            self._file.flush()
        except OSError as error:
            raise StatisticsError(
                f"{self._directory} has no room for what the memory cannot hold ({error}); make room, or raise --memory"
            ) from error
        self._end = max(self._end, place + size)
        return place

    def _read(self, storage: torch.UntypedStorage, place: int) -> None:
        home = storage if storage.device.type == "cpu" else torch.UntypedStorage(storage.nbytes())
        assert self._file is not None
        try:
            self._file.seek(place)
            whole = self._file.readinto(_bytes(home)) == home.nbytes()  # type: ignore[attr-defined]
        except OSError as error:
            raise StatisticsError(f"a file in {self._directory} cannot be read ({error}); run it again") from error
        if not whole:
            raise StatisticsError(f"a file in {self._directory} has become shorter; run it again")
        if home is not storage:
            storage.copy_(home)


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    """The very bytes; numpy would keep the storage from ever being emptied."""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
