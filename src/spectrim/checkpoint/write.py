"""Writing a model as a standard Hugging Face directory that appears whole or not at all."""

import fnmatch
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from spectrim.checkpoint.card import CARD, model_card
from spectrim.checkpoint.names import compressed_layers
from spectrim.checkpoint.quantizer import attach, release
from spectrim.checkpoint.read import PROVENANCE, load_processor, read_provenance
from spectrim.errors import CheckpointError
from spectrim.files import sync

# Files of a source directory that describe its own weights, and are not copied beside other ones.
_NOT_COPIED = (
    ".*", CARD, "config.json", "generation_config.json", "*.index.json", "*.safetensors", "*.bin", "*.pt",
    "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", PROVENANCE,
)  # fmt: skip


def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    processor: Any = None,
    provenance: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write `model`, factored or dense, with everything that it needs to run; returns the directory.

    `processor` is a processor or tokenizer object, or a model directory or hub id whose processor, tokenizer and
    chat-template files (and licence) are copied byte for byte. `provenance` (JSON types: recipe, plan, data
    fingerprints, package versions, predicted loss, how it was ``fine_tuned`` since, …) goes into ``spectrim.json``, and
    the model card is made of it; the card of the source is not copied. `files` maps names of further text files to
    their content; a ``README.md`` among them is the card. The generation config is the model's.

    All is written and synced in a hidden directory beside the target, which then replaces it in one step. A non-empty
    directory that this function did not write is refused with CheckpointError unless `overwrite`; so are names in
    `files` that belong to the model, provenance that JSON cannot hold, and a model that cannot be stored. A full disk
    or any other I/O error is a CheckpointError, too, and leaves the target as it was.
    """
    target = Path(directory).expanduser().resolve()
    files = dict(files or {})
    record = _record(provenance, files)
    _check_target(target, overwrite)
    if compressed_layers(model):
        attach(model)
    with _io_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(target) as temporary:
            _write_processor(processor, temporary)
            for name, text in files.items():
                if (temporary / name).exists():
                    raise CheckpointError(f"{name!r} is a file of the processor; give your file another name")
                (temporary / name).write_text(text, encoding="utf-8")
            model.save_pretrained(temporary, max_shard_size=max_shard_size)
            for weights in temporary.glob("*.safetensors"):  # safetensors keeps its files from other users
                shutil.copymode(temporary / "config.json", weights)
            (temporary / PROVENANCE).write_text(record, encoding="utf-8")
            if CARD not in files:
                (temporary / CARD).write_text(model_card(model, provenance or {}), encoding="utf-8")
    return target


def check_target(target: Path, *, overwrite: bool, protected: Iterable[Path] = ()) -> None:
    """CheckpointError unless a checkpoint may be written to `target`: nothing that exists is lost.

    Without `overwrite`, what exists is refused, but for an empty directory; with it, all but a directory that spectrim
    wrote. It may not be, contain or lie in one of the `protected` paths, nor be or contain the current directory.
    """
    target = target.expanduser().resolve()
    for path in (*protected, Path.cwd()):
        path = path.expanduser().resolve()
        if target == path or target in path.parents or (path != Path.cwd() and path in target.parents):
            raise CheckpointError(f"{target} is, contains or lies in {path}, which is in use; name another directory")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a directory")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists; name another directory, or replace it with --overwrite")
    try:
        read_provenance(target)
    except CheckpointError as error:
        raise CheckpointError(f"{target} was not written by spectrim; name another directory") from error


def _record(provenance: Mapping[str, Any] | None, files: Mapping[str, str]) -> str:
    for name in files:
        if name != CARD and (not name or Path(name).name != name or _matches(name, _NOT_COPIED)):
            raise CheckpointError(
                f"{name!r} cannot be added to a checkpoint; choose a plain name that no model file has"
            )
    record = {**(provenance or {}), "spectrim_version": release(), "files": sorted(files)}
    try:
        return json.dumps(record, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the provenance is not JSON ({error}); give numbers, strings, lists and dicts"
        ) from error


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a directory")
    if overwrite or not target.exists() or not any(target.iterdir()):
        return
    try:
        read_provenance(target)
    except CheckpointError as error:
        raise CheckpointError(
            f"{target} is not empty and was not written by spectrim; name another directory"
        ) from error


def _write_processor(processor: Any, directory: Path) -> None:
    if processor is None:
        return
    if not isinstance(processor, str | Path):
        processor.save_pretrained(directory)
        return
    source = Path(processor)
    if not source.is_dir():  # a hub id: fetch what belongs to its processor, then copy it from the cache
        load_processor(processor)
        source = Path(str(cached_file(str(processor), "config.json", local_files_only=True))).parent
    added = read_provenance(source)["files"] if (source / PROVENANCE).exists() else []  # plan.json of another model
    for path in source.iterdir():
        if path.is_file() and path.name not in added and not _matches(path.name, _NOT_COPIED):
            shutil.copyfile(path, directory / path.name)
    templates = "additional_chat_templates"
    if (source / templates).is_dir():
        shutil.copytree(source / templates, directory / templates)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


@contextmanager
def _io_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise CheckpointError(f"cannot write {target} ({error}); free space or name another directory") from error


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, which takes its place when the block ends without an exception."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    former = temporary.with_suffix(".old")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if target.exists():
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
