"""Rows of local jsonl files and of Hugging Face datasets; what text and image sources have in common."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spectrim.errors import SampleError

# Names that a data set's author gives to the splits that this project calls by another name.
_HUB_SPLITS = {"calibration": "train", "heldout": "test"}
_SHUFFLE_BUFFER = 1000  # rows that a streamed data set is shuffled over


def local_path(source: str, suffixes: frozenset[str]) -> Path | None:
    """The file or folder that ``source`` names, or None when it reads as a data set id.

    Args:
        source: what the user gave.
        suffixes: file endings that mark a missing file as a file all the same.

    Raises:
        SampleError: ``source`` is written like a path and nothing is there.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix.lower() in suffixes | {".jsonl"}:
        raise SampleError(f"sample source '{source}' does not exist; give an existing file or folder, or 'builtin'")
    return None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of every line that is not blank.

    Raises:
        SampleError: a line is not UTF-8 or not a JSON object; the message names the line.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SampleError(f"{path}, line {number} is not JSON ({error}); write one object per line") from error
            if not isinstance(row, dict):
                raise SampleError(f"{path}, line {number} is not a JSON object; write one object per line")
            yield number, row


def hub_rows(source: str, split: str, *, column: str, seed: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a Hugging Face data set, streamed, so that only what is used is fetched.

    Args:
        source: ``id``, ``id:config`` or ``id:config:split``; an empty config means the default one.
        split: taken when ``source`` names none ("calibration" means "train", "heldout" means "test").
        column: must be present; an image column is handed out encoded, as ``{"bytes": ..., "path": ...}``.
        seed: shuffles the rows; None keeps their order.

    Raises:
        SampleError: the package ``datasets`` is missing, or the data set cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise SampleError(
            f"'{source}' is no local file, and reading it as a data set id needs the package datasets: "
            "pip install 'spectrim[eval]'"
        ) from error
    name, config, wanted = (*source.split(":", 2), "", "")[:3]
    try:
        rows = datasets.load_dataset(
            name, config or None, split=wanted or _HUB_SPLITS.get(split, split), streaming=True
        )
        if seed is not None:
            if isinstance((rows.features or {}).get(column), datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        for row in rows:
            if column not in row:
                raise SampleError(f"data set '{source}' has no column '{column}' (it has {', '.join(row)})")
            yield row
    except SampleError:
        raise
    except Exception as error:  # the client raises kinds of many packages; the cause stays chained
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SampleError(
            f"'{source}' is no local file and could not be read as a data set ({reason}); "
            "check the name and the connection, or give a file"
        ) from error
