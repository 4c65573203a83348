"""Rows of local files with columns: jsonl, csv, tsv and parquet."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spectrim.errors import SampleError, first_line
from spectrim.files import parse_json
from spectrim.samples.chat import TURNS
from spectrim.samples.sources import by_key, read_jsonl

ROWS = (".jsonl", ".csv", ".tsv", ".parquet")  # endings of files of rows
_LISTS = (*TURNS, "images", "prompt", "completion")  # keys under which a cell may hold a list as JSON
_BATCH = 64  # rows of a parquet file that are in memory at a time; each may hold images


def is_table(path: Path) -> bool:
    """Whether a file is one of rows, by its name."""
    return path.suffix.lower() in ROWS


def read_rows(path: Path, known: tuple[str, ...], columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a file: where it stands, for messages ("FILE, line 1" or "FILE, row 1"), and its values by key.

    Args:
        path: a file for which :func:`is_table` holds.
        known: keys that are used; others are not read from csv and parquet files.
        columns: columns to read in place of those with the names of the keys, by key; empty for none.

    Raises:
        SampleError: the file cannot be read, a row is malformed, there is no such column, or a package is missing.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        for where, row in read_jsonl(path):
            yield where, by_key(row, columns)
        return
    wanted = columns or dict(zip(known, known, strict=True))
    rows = _read_parquet(path, wanted, columns) if suffix == ".parquet" else _read_csv(path, wanted, columns)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, _with_lists(row, where)


def count_rows(path: Path) -> int:
    """Rows of a parquet file. Raises SampleError."""
    with _parquet(path) as file:
        return int(file.metadata.num_rows)


def _read_csv(path: Path, wanted: Mapping[str, str], named: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # long texts
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = next(reader, [])
            present = _present(path, header, wanted, named)
            for number, cells in enumerate(filter(None, reader), start=1):
                if len(cells) != len(header):
                    raise SampleError(
                        f"{path}, row {number} has {len(cells)} fields and the header {len(header)}; quote fields that "
                        "hold commas or line ends"
                    )
                row = {key: cells[header.index(column)] for key, column in present.items()}
                yield {key: cell for key, cell in row.items() if cell or key == "text"}  # an empty cell is none
    except UnicodeDecodeError as error:
        raise SampleError(f"{path} is not UTF-8 (byte {error.start}); convert it to UTF-8") from error
    except csv.Error as error:
        raise SampleError(f"{path}, row {number + 1} is not CSV ({error}); correct its quotes") from error
    except OSError as error:
        raise SampleError(f"{path} cannot be read ({error.strerror}); name a file that you may read") from error


def _read_parquet(path: Path, wanted: Mapping[str, str], named: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    with _parquet(path) as file:
        present = _present(path, file.schema_arrow.names, wanted, named)
        try:
            for batch in file.iter_batches(_BATCH, columns=[*present.values()]):
                for row in batch.to_pylist():
                    yield {key: row[column] for key, column in present.items()}
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own are kinds of these
            raise _broken(path, error) from error


def _parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise SampleError(f"reading {path} needs the package pyarrow: pip install 'spectrim[eval]'") from error
    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> SampleError:
    return SampleError(f"{path} cannot be read as a parquet file ({first_line(error)}); repair or replace it")


def _present(path: Path, header: list[str], wanted: Mapping[str, str], named: Mapping[str, str]) -> dict[str, str]:
    """The wanted columns that a file has, by key; SampleError where it lacks all of them, or one that was named."""
    missing = [column for column in named.values() if column not in header]
    present = {key: column for key, column in wanted.items() if column in header}
    if missing or not present:
        names = ", ".join(map(repr, missing or wanted.values()))
        raise SampleError(
            f"{path} has no column {names} (it has {', '.join(header) or 'none'}); name one that it has, as in "
            f"'{path.name}[{(header or ['column'])[0]}]'"
        )
    return present


def _with_lists(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with lists that its cells hold as JSON, such as the turns of a conversation."""
    for key in _LISTS:
        cell = row.get(key)
        if not isinstance(cell, str) or not cell.lstrip().startswith("["):
            continue
        try:
            found = parse_json(cell)
        except ValueError as error:
            if key not in TURNS:
                continue  # a question may begin with a bracket
            raise SampleError(f'{where}: "{key}" {error}; write a list of turns as JSON') from error
        if key in (*TURNS, "images") or all(isinstance(turn, dict) for turn in found):
            row[key] = found
    return row
