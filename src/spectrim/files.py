"""Reading JSON and YAML that somebody else may have written, and writing files whole or not at all."""

import json
import os
import re
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from spectrim.errors import UsageError

PART = ".part"  # ends the names of files that are being written


def user_path(path: str | Path) -> Path:
    """A path with ``~`` read as the home directory. Raises UsageError if there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"the first part of {str(path)!r} is no user's home ({error}); name another path") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` for the block to write, which then takes its place: whole, or not at all.

    It is synced and can be read by everybody. Its name is unique, so that two processes may write one path at a time.
    Missing parent directories are made.

    Raises:
        OSError: the disk is full, or nothing may be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write bytes as :func:`replacing` does. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def sync(path: Path) -> None:
    """Make a file, or the entries of a directory, outlast a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_json(content: str | bytes) -> Any:
    """The value that JSON text stands for.

    Raises ValueError, whose message is the rest of a sentence ("FILE …"), for text that is not UTF-8, not JSON, nested
    too deeply, or that gives a key of one object twice: the first value would be lost silently.
    """
    try:
        value = json.loads(content, object_pairs_hook=_unique, parse_int=_integer)
        json.dumps(value, ensure_ascii=False).encode()  # an escaped half of a surrogate pair is no character
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair (such as \\ud800), which is no character") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply to be read") from error
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, whose message names the file and what is wrong with it."""
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def parse_yaml(content: str | bytes) -> Any:
    """The value that YAML text stands for; as `parse_json` otherwise, with tags of Python objects refused.

    1e-3 is a number, as in YAML 1.2, and not a word.
    """
    try:
        return yaml.load(content, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, a number or date that is none
        raise ValueError(f"is not YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply to be read") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"gives the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return entries


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as error:
        raise ValueError(f"holds a number of {len(digits)} digits") from error


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"gives the key {key!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)
