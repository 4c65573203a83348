"""One writer at a time in a statistics directory; readers never ask."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spectrim.errors import StatisticsError
from spectrim.files import PART

if sys.platform != "win32":  # where there is no such lock, and directories are not guarded
    import fcntl

LOCK = ".lock"


@contextmanager
def writing(directory: Path, *, alone: bool) -> Iterator[None]:
    """Hold the lock of a directory, which is made if missing, while the block writes there.

    `alone` keeps all others out, for runs that change what the directory holds. Runs that only add whole files, under
    names that say what is in them, may write together. The first one there removes half-written files of killed runs.

    The lock is the kernel's and ends with its process; a file with a pid would outlive it, and the pid may be another's
    by then. Forked children share the lock, so it is released and not only closed.

    Raises:
        StatisticsError: another process writes there, or nothing can be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StatisticsError(
            f"{directory} cannot be written ({error}); make room, or name a directory of yours"
        ) from error
    owner = os.getpid()
    try:
        if (free := _locked(descriptor, directory)) or not alone:
            if free:
                os.truncate(descriptor, 0)
                for part in directory.rglob(f".*{PART}"):
                    part.unlink(missing_ok=True)
            if alone:
                os.write(descriptor, str(os.getpid()).encode())
            elif sys.platform != "win32":
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits only while another process cleans up
            yield
            return
        writer = os.read(descriptor, 20).decode(errors="replace")
    finally:
        if sys.platform != "win32" and os.getpid() == owner:  # and no child that leaves the block
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
    raise StatisticsError(
        f"another process{f' ({writer})' if writer.isdecimal() else ''} writes to {directory}; wait until it is done, "
        "or choose another output directory"
    )


def _locked(descriptor: int, directory: Path) -> bool:
    """Take the whole lock, if it is free."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StatisticsError(f"{directory} cannot be locked ({error}); choose a directory on another disk") from error
    return True
