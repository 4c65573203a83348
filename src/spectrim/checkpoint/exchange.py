"""Directories that appear whole or not at all, and what killed runs left beside them."""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spectrim.files import sync


@contextmanager
def replacing_directory(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A new directory beside `target`, which takes its place when the block ends without an exception.

    `check` is called before the exchange, which may be long after the block began: it raises where `target` has become
    one that must not be replaced. Both directories are locked as long as they have names that `recover` looks for, by
    locks that end with this process.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    former = temporary.with_suffix(".old")
    temporary.mkdir()
    with ExitStack() as locks:
        locks.enter_context(_locked(temporary))
        try:
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            check()
            if target.exists():
                locks.enter_context(_locked(target))
                target.replace(former)
            try:
                temporary.replace(target)
            except BaseException:
                if former.exists():
                    former.replace(target)
                raise
            sync(target.parent)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)
        if former.exists():
            shutil.rmtree(former)


def recover(target: Path) -> None:
    """Remove what killed runs of `replacing_directory` left beside `target`.

    A run that was killed between its two renamings is undone; directories of live processes stay. Raises OSError.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    try:
        beside = [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return
    # The latest first: where several are left, it is what the target was.
    for path in sorted(beside, key=lambda path: path.lstat().st_mtime, reverse=True):
        with _locked(path) as held:
            if not held or not path.exists():
                continue
            if path.suffix == ".old" and not target.exists():
                path.replace(target)
            else:
                shutil.rmtree(path)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """A lock on a directory that ends with the process; False where another has it, or where there can be none."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
