"""The weight files of a model directory, looked at before anything is loaded: which there are, and what they hold."""

import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from spectrim.checkpoint.sources import read_object
from spectrim.errors import ModelError, SpectrimError

FUSED = re.compile(r"\bexperts\.(gate_up|gate_and_up|up|down)_projs?$")  # names of tensors of all experts of a layer
_FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
_COUNTS = ("I", "U", "BOOL", "int", "uint", "bool")  # dtypes that buffers have, such as masks and indices


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers reads the weights from: safetensors before pickles, one file before shards.

    Raises:
        ModelError: there are none, or the index is none that can be followed inside the directory.
    """
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _shards(directory / index)
    raise ModelError(f"{directory} lacks its weights, {SAFE_WEIGHTS_NAME}; save the model as safetensors")


def _shards(index: Path) -> list[Path]:
    content = read_object(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index} has no weight_map from names of tensors to files; copy it again")
    if not isinstance(content.get("metadata"), dict):  # which transformers reads
        raise ModelError(f"{index} has no metadata object; copy it again, or add {{}}")
    shards = sorted(set(names.values()))
    for name in shards:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name.isprintable():
            raise ModelError(f"{index} names the file {name!r}, which is outside its directory; copy the model again")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index.parent} lacks {name}, which its {index.name} names; copy it again")
    return [index.parent / name for name in shards]


def holds_fused(files: list[Path]) -> bool:
    """Whether safetensors files hold experts of a layer in one tensor."""
    return any(FUSED.search(name) for file in files for name, *_ in _tensors(file, ModelError))


def loaded_bytes(files: list[Path], dtype: torch.dtype | None) -> int:
    """What weights take in memory in a dtype; None for that of the files."""
    if dtype is None:
        return sum(file.stat().st_size for file in files)
    floats = (count for file in files for _, kind, count in _tensors(file, ModelError) if kind in _FLOATS)
    return sum(floats) * dtype.itemsize


def check_weights(files: list[Path], error: type[SpectrimError], *, quantized: bool) -> None:
    """Refuse files that cannot be read, and weights that are no floats in a model that is not `quantized`.

    transformers would take integers and 8-bit floats, which mean nothing without their scales, for the weights. Only
    headers are read.

    Raises:
        error: a file is truncated or of another kind; names it.
        ModelError: a weight is no float; names the tensor.
    """
    for file in files:
        for name, dtype, _ in _tensors(file, error):
            if quantized or dtype in _FLOATS:
                continue
            weight = name.endswith(("weight", "_proj", "kernel"))
            if weight or not dtype.startswith(_COUNTS):
                raise ModelError(
                    f"{file} holds {name} as {dtype}, and its config.json has no quantization_config that says what "
                    "the numbers mean; start from the model in bfloat16, float16 or float32"
                )


def _tensors(file: Path, error: type[SpectrimError]) -> Iterator[tuple[str, str, int]]:
    """Names, dtypes and numbers of entries of all tensors in a file."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    held = tensors.get_slice(name)
                    yield name, held.get_dtype(), math.prod(held.get_shape())
        except (OSError, SafetensorError) as failure:
            raise error(f"{file} is truncated or not a safetensors file ({failure}); copy it again") from failure
        return
    try:
        tensors = torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file) or None)
        for name, x in tensors.items():
            if torch.is_tensor(x):
                yield name, str(x.dtype).removeprefix("torch."), x.numel()
    except pickle.UnpicklingError as failure:
        raise error(
            f"{file} is no file of tensors, or a pickle that runs code, which is refused; save the model as safetensors"
        ) from failure
    except Exception as failure:  # a pickle is somebody else's program, and reading it may raise anything
        raise error(f"{file} is truncated or no file that torch.save wrote; copy it again") from failure
