"""Files of moments: what they must hold, and matrices of moments in the form that takes least room.

A full moment ``Σ x xᵀ`` of few positions lies there as its rows (``NAME.rows``), others as the half of their matrix
(``NAME.half``): finished ones as precisely as their products were formed, and those that still grow in float64.
"""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from spectrim.calibrate.manifest import Gathered, Manifest, TensorFile
from spectrim.errors import StatisticsError
from spectrim.maths.sums import Gram, few_rows, half_width

_ROWS, _HALF = ".rows", ".half"


def written(name: str, gram: Gram, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensor of a moment by its name in a file; `dtype` is that of a half."""
    if (rows := gram.rows) is not None:
        return {name + _ROWS: rows}
    return {name + _HALF: gram.half(dtype)}


def read_gram(directory: Path, gathered: Gathered, block: str, name: str) -> Gram:
    """The moment of that name; StatisticsError when the file is gone or damaged."""
    path = directory / gathered.files[block].name
    try:
        with safe_open(path, framework="pt") as file:
            there = {*file.keys()}
            if name + _ROWS in there:
                rows = file.get_tensor(name + _ROWS)
                return Gram(rows.shape[1], rows=rows)
            if name + _HALF in there:
                return Gram.of_half(file.get_tensor(name + _HALF))
            return Gram.of(file.get_tensor(name))  # of format 4
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, directory, error) from error


def _unreadable(path: Path, directory: Path, error: Exception) -> StatisticsError:
    return StatisticsError(f"{path} cannot be read ({error}); delete {directory} and calibrate again")


def _whole(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The name and the shape of a moment as a matrix, of those of its tensor in a file."""
    if name.endswith(_ROWS) and len(shape) == 2 and shape[0] <= few_rows(shape[1]):
        return name.removesuffix(_ROWS), (shape[1], shape[1])
    if name.endswith(_HALF) and len(shape) == 1 and (width := half_width(shape[0])):
        return name.removesuffix(_HALF), (width, width)
    return name, shape


def _shapes(unit: str, manifest: Manifest) -> dict[str, dict[str, tuple[int, ...]]]:
    """By block and tensor name, the shapes of everything that one unit must have on disk, matrices as they are."""
    gathered, wanted = manifest.gathered[unit], dict[str, dict[str, tuple[int, ...]]]()

    def want(linear: str, shapes: dict[str, tuple[int, ...]]) -> None:
        wanted.setdefault(manifest.blocks[linear], {}).update(
            {f"{linear}.{part}": shape for part, shape in shapes.items()}
        )

    sizes = {linear: manifest.model.shape(f"{linear}.weight") for linear in manifest.blocks}  # [out, in]
    for owner in gathered.counts:
        width = sizes[owner][1]
        want(owner, {"second": (width, width), "abs_sum": (width,)})
    for linear in gathered.fisher:
        want(linear, {"fisher_cols": (sizes[linear][1],)})
    for linear in gathered.outputs:
        shapes = manifest.output_forms[linear].shapes(sizes[linear][0])
        want(linear, shapes | {"traces": (4, manifest.heads.get(linear, 1))})
    return wanted


def read_tensor(directory: Path, gathered: Gathered, block: str, name: str) -> torch.Tensor:
    """One float64 tensor of a block's file; StatisticsError when the file is gone or damaged."""
    path = directory / gathered.files[block].name
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, directory, error) from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 2 GB/s and more per core. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest: its digest, and the names and shapes of its tensors.

    Raises:
        StatisticsError: a file is missing, truncated or changed, or holds other tensors; names the file.
    """
    wanted = [
        (directory / gathered.files[block].name, gathered.files[block], shapes[block])
        if block in shapes and block in gathered.files
        else (directory / f"{unit}.{block}", None, {})
        for unit, gathered in manifest.gathered.items()
        for shapes in [_shapes(unit, manifest)]
        for block in sorted(shapes.keys() | gathered.files.keys())
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # which reads and hashes files side by side
        differences = pool.map(lambda file: _difference(*file), wanted)
        for (path, _, _), difference in zip(wanted, differences, strict=True):
            if difference is not None:
                raise StatisticsError(f"{path} {difference}; delete {directory} and calibrate again")


def _difference(path: Path, known: TensorFile | None, shapes: dict[str, tuple[int, ...]]) -> str | None:
    try:
        if known is None or path.stat().st_size != known.size:
            return "is missing or truncated"
        if path.is_symlink():
            return "is a link, which may lead to anything"
        if file_digest(path) != known.sha256:
            return "has changed since it was written"
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            held = Counter(_whole(name, tuple(part.get_shape())) for name, part in parts.items())
            kinds = {(part.get_dtype(), name.endswith((_ROWS, _HALF))) for name, part in parts.items()}
    except (OSError, SafetensorError):
        return "is missing or truncated"
    wanted = Counter(shapes.items())
    if strange := sorted((held - wanted) + (wanted - held)):
        return f"does not hold the moments of this model ({strange[0][0]})"
    allowed = {("F64", False), ("F64", True), ("F32", True)}
    return f"holds moments in {min(kinds - allowed)[0]}" if kinds - allowed else None
