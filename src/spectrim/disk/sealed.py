"""Files of tensors that record what they belong to and their digests, so that wrong or changed ones are noticed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spectrim.errors import StatisticsError
from spectrim.files import parse_json, replacing


@dataclass(frozen=True)
class Sealed:
    """An open file: its note, and its tensors by name."""

    path: Path
    note: str
    digests: Mapping[str, str]
    file: Any

    def tensor(self, name: str, *, checked: bool = False) -> torch.Tensor:
        """One tensor. Raises StatisticsError where it is not the one that was written, unless that was `checked`."""
        try:
            tensor: torch.Tensor = self.file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.path, str(error)) from error
        if not checked and _digest(tensor) != self.digests[name]:
            raise _damaged(self.path, f"{name} has changed since it was written")
        return tensor


def write_sealed(path: Path, tensors: Mapping[str, torch.Tensor], *, of: str, note: str = "") -> None:
    """Write tensors, whole or not at all. Raises StatisticsError where that fails."""
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    content = json.dumps({"of": of, "note": note, "digests": {name: _digest(held[name]) for name in held}})
    try:
        with replacing(path) as temporary:
            save_file(held, temporary, metadata={"content": content, "digest": _sha256(content.encode())})
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise StatisticsError(
            f"{path} cannot be written ({error}); make room, or copy the statistics to a folder of yours"
        ) from error


def open_sealed(path: Path, *, of: str) -> Sealed:
    """The file at `path`, which must be of what `of` says.

    Raises:
        StatisticsError: it is missing, damaged, or of something else.
    """
    try:
        file = safe_open(path, framework="pt")
        held, names = file.metadata() or {}, set(file.keys())
        content = parse_json(held["content"])
        whole = held["digest"] == _sha256(held["content"].encode()) and names == content["digests"].keys()
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    if not whole:
        raise _damaged(path, "its header has changed since it was written")
    if content["of"] != of:
        raise _damaged(path, f"it is that of {content['of']}")
    return Sealed(path, content["note"], content["digests"], file)


def _damaged(path: Path, why: str) -> StatisticsError:
    return StatisticsError(f"{path} cannot be read ({why}); delete it and compress again")


def _digest(tensor: torch.Tensor) -> str:
    """Of dtype, shape and bytes."""
    head = f"{tensor.dtype} {list(tensor.shape)}".encode()
    return _sha256(head, tensor.reshape(-1).view(torch.uint8).numpy())


def _sha256(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
