"""A temporary folder that is removed at the end, or else, where its process was killed, by the next one."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PREFIX, _LOCK = "spectrim-", ".spectrim-lock"


@contextmanager
def scratch() -> Iterator[Path]:
    """A new folder inside the system's temporary folder while the block runs.

    A lock in it says that its process lives, and ends with the process, however that ends. Folders of processes that
    are gone are removed first; those without a lock file are not ours. Raises OSError where there is no room.
    """
    _sweep(Path(tempfile.gettempdir()))
    folder, lock = _made()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _made() -> tuple[Path, IO[str]]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with suppress(FileNotFoundError):  # another process may sweep the folder before it is locked
            lock = (folder / _LOCK).open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / _LOCK).exists():
                return folder, lock
            lock.close()


def _sweep(root: Path) -> None:
    for path in root.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), path.open() as lock:  # of another user, or locked: its process lives
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.parent.is_symlink():
                shutil.rmtree(path.parent, ignore_errors=True)
