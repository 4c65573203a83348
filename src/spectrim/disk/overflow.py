"""Tensors that nobody needs for a while: in memory as far as it goes, beyond it in a file."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from spectrim.disk.shelf import Shelf
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
        self._shelf: Shelf | None = None  # made when it is needed
        self._left: set[int] = set()  # addresses of storages
        self._free: dict[int, list[int]] = {}  # places in the file, by size
        self._inside: dict[object, int] = {}  # bytes in memory
        self._outside: dict[object, list[tuple[torch.UntypedStorage, int, int]]] = {}  # with bytes and place

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shelf is not None:
            self._shelf.close()

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
        self._outside[owner] = [(storage, storage.nbytes(), self._written(storage)) for storage in held]
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
            assert self._shelf is not None
            storage.resize_(size)
            try:
                self._shelf.read(storage, place)
            except OSError as error:
                raise StatisticsError(f"a file in {self._directory} cannot be read ({error}); run it again") from error

    def _empty(self, owner: object) -> None:
        for storage, _, _ in self._outside.get(owner, ()):
            storage.resize_(0)

    def _written(self, storage: torch.UntypedStorage) -> int:
        """Its place in the file: that of one of its size that has come back, where there is one."""
        free = self._free.get(storage.nbytes())
        try:
            self._shelf = self._shelf or Shelf(self._directory)
            return self._shelf.write(storage, free.pop() if free else None)
        except OSError as error:
            raise StatisticsError(
                f"{self._directory} has no room for what the memory cannot hold ({error}); make room, or raise --memory"
            ) from error
