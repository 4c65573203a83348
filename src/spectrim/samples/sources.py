"""Names of sources, rows of jsonl files and of Hugging Face datasets; what text and image sources have in common."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spectrim.errors import SampleError, first_line
from spectrim.files import parse_json, user_path
from spectrim.settings import split_weight

# Names that a data set's author gives to the splits that this project calls by another name.
_HUB_SPLITS = {"calibration": "train", "heldout": "test"}
# Endings of file names, which names of data sets do not have; some are of files that are refused.
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_FILES = IMAGES | {".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".zip", ".tar", ".gz"}
_COLUMNS = re.compile(r"(.+)\[([^\[\]]+)\]", re.DOTALL)
_SHUFFLE_BUFFER = 1000  # rows that a streamed data set is shuffled over


def check_positive(*, seed: int = 0, **values: int | None) -> None:
    """Raise SampleError for a number below 1, and for a seed below 0; None passes."""
    for name, least, value in [("seed", 0, seed), *((name, 1, value) for name, value in values.items())]:
        if value is not None and value < least:
            raise SampleError(f"{name} must be at least {least}, not {value}")


def split_columns(source: str) -> tuple[str, str]:
    """A source as the name of its file or data set and what stands in brackets behind it, ``FILE[column]``, if any."""
    found = _COLUMNS.fullmatch(source)
    if found is None or _exists(source):
        return source, ""
    return found[1], found[2]


def named_columns(source: str, known: tuple[str, ...]) -> dict[str, str]:
    """The columns that a source names, ``FILE[column]`` or ``FILE[key=column,…]``, by key; empty where it names none.

    Args:
        source: with or without columns.
        known: keys that rows may have; a column alone stands for the first of them.

    Raises:
        SampleError: a key is unknown or comes twice, or a column is empty.
    """
    inside = split_columns(source)[1]
    columns: dict[str, str] = {}
    for part in inside.split(",") if inside else ():
        key, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals:
            key, column = known[0], key
        if key not in known or not column:
            raise SampleError(
                f"sample source '{source}' names columns by '{part.strip()}'; write KEY=COLUMN, with a key of "
                f"{', '.join(known)}"
            )
        if key in columns:
            raise SampleError(f"sample source '{source}' names a column for {key} twice; name one")
        columns[key] = column
    return columns


def by_key(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with the values of named columns under their keys; as it is where none are named."""
    return {key: row.get(column) for key, column in columns.items()} if columns else row


def _exists(source: str) -> bool:
    try:
        return user_path(source).exists()
    except OSError:
        return False


def local_path(source: str) -> Path | None:
    """The file or folder that ``source`` names, or None when it reads as a data set id; columns do not count.

    Raises:
        SampleError: ``source`` is written like a path and nothing is there, or it has a weight and nothing beside it.
    """
    path = user_path(split_columns(source)[0])
    try:
        if path.exists():
            return path
    except OSError as error:  # a name that is too long, a folder that is closed
        raise SampleError(f"sample source '{source[:80]}' cannot be opened ({error.strerror}); name a file") from error
    name, weight = split_weight(source)
    if weight is not None and (name == "builtin" or _exists(split_columns(name)[0])):
        raise SampleError(f"the weight of '{source}' has no effect without a second source; leave it out")
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix.lower() in _FILES:
        raise SampleError(f"sample source '{source}' does not exist; give an existing file or folder, or 'builtin'")
    return None


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line that is not blank: where it stands ("FILE, line 1"), for messages, and its object.

    Raises:
        SampleError: the file cannot be read, or a line is not UTF-8 or not a JSON object; the message names the line.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise SampleError(f"{where} {error}; write one JSON object per line") from error
                if not isinstance(row, dict):
                    raise SampleError(f"{where} is not a JSON object; write one object per line")
                yield where, row
    except OSError as error:
        raise SampleError(f"{path} cannot be read ({error.strerror}); name a file that you may read") from error


def no_datasets(source: str) -> SampleError:
    """The error for a data set id where the package that reads data sets is not installed."""
    return SampleError(
        f"'{source}' is no local file, and reading it as a data set id needs the package datasets: "
        "pip install 'spectrim[eval]'"
    )


def hub_rows(
    source: str, split: str, *, columns: tuple[str, ...], seed: int | None = None, revision: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a Hugging Face data set, each after its name for messages; streamed: only what is used is fetched.

    Args:
        source: ``id``, ``id:config`` or ``id:config:split``; an empty config means the default one.
        split: taken when ``source`` names none ("calibration" means "train", "heldout" means "test").
        columns: one of them must be present; images are handed out encoded, as ``{"bytes": ..., "path": ...}``.
        seed: shuffles the rows; None keeps their order.
        revision: of the data set's repository; None is its main branch.

    Raises:
        SampleError: the package ``datasets`` is missing, or the data set cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise no_datasets(source) from error
    name, config, wanted = (*split_columns(source)[0].split(":", 2), "", "")[:3]
    try:
        rows = datasets.load_dataset(
            name, config or None, split=wanted or _HUB_SPLITS.get(split, split), streaming=True, revision=revision
        )
        if seed is not None:
            for column in columns:
                feature = (rows.features or {}).get(column)
                encoded: Any = datasets.Image(decode=False)
                if isinstance(feature, datasets.Image):
                    rows = rows.cast_column(column, encoded)
                elif isinstance(getattr(feature, "feature", None), datasets.Image):  # a list of images
                    rows = rows.cast_column(column, datasets.List(encoded))
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        for number, row in enumerate(rows, start=1):
            if not any(column in row for column in columns):
                names = " or ".join(f"'{column}'" for column in columns)
                raise SampleError(f"data set '{source}' has no column {names} (it has {', '.join(row)})")
            yield f"data set '{source}', row {number}", row
    except SampleError:
        raise
    except Exception as error:  # the client raises kinds of many packages; the cause stays chained
        raise SampleError(
            f"'{source}' is no local file and could not be read as a data set ({first_line(error)}); "
            "check the name and the connection, or give a file"
        ) from error
