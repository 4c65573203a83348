"""Writing a model as a standard Hugging Face directory that appears whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from spectrim.away import is_away
from spectrim.checkpoint.card import model_card
from spectrim.checkpoint.exchange import recover, replacing_directory
from spectrim.checkpoint.model_files import (
    CARD,
    PROVENANCE,
    clean_configs,
    foreign_file,
    processor_files,
    public_name,
    without_paths,
)
from spectrim.checkpoint.names import compressed_layers
from spectrim.checkpoint.plain import plain_config, save_plain
from spectrim.checkpoint.quantizer import attach
from spectrim.checkpoint.read import load_processor, read_provenance
from spectrim.checkpoint.sources import local_files, split_source
from spectrim.errors import CheckpointError
from spectrim.files import user_path
from spectrim.recipe import Format
from spectrim.versions import release

# Names of the model's own files, which no other file of a checkpoint may have.
_RESERVED = (
    ".*", "config.json", "generation_config.json", "*.index.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt",
    "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "adapter_config.json", "*.py", PROVENANCE,
)  # fmt: skip


def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    processor: Any = None,
    provenance: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    format: Format = "spectrim",
    verify: Callable[[Path], Mapping[str, Any] | None] | None = None,
) -> Path:
    """Write `model`, factored or dense, with everything that it needs to run; returns the directory.

    `processor` is a processor or tokenizer object, or a model directory or hub id whose processor, tokenizer and
    chat-template files (and licence) are copied; nothing else of a directory is, and no link is followed out of it. Of
    a GGUF file the tokenizer is read and saved. `provenance` (JSON types: recipe, plan, data fingerprints, package
    versions, predicted loss, how it was ``fine_tuned`` since, …) goes into ``spectrim.json``, and the model card is
    made of it; the card of the source is not copied. `files` maps names of further text files to their content; a
    ``README.md`` among them is the card. The generation config is the model's. Of paths of this machine only the last
    part is written. Code of a model that was loaded with ``trust_remote_code=True`` is written beside its config.

    `format` ``compressed-tensors`` writes dense integers on one grid so that others load them without spectrim; a model
    that holds anything else is a CheckpointError then.

    No file is larger than `max_shard_size`, unless one tensor is. By default that is 5GB, and 1GB where parts of the
    model are on disk: what a file takes of these is in memory while it is written.

    `verify` gets the written directory before it takes its place, and raises whatever must stop that. What it returns
    is added to the provenance.

    All is written and synced in a hidden directory beside the target, which then replaces it in one step. A target that
    `check_target` refuses is a CheckpointError, and so is one that the model was loaded from; so are names in `files`
    that belong to the model, provenance that JSON cannot hold, and a model that cannot be stored. A full disk or any
    other I/O error is a CheckpointError, too, and leaves the target as it was.
    """
    files = dict(files or {})
    _check_names(files)
    _json(provenance or {})
    record = _public(provenance or {})
    origin = local_files(model.name_or_path or "")
    exists = os.path.lexists(Path(directory).expanduser())  # else nothing of the origin can be replaced
    protected = [origin] if origin is not None and exists else []
    target = check_target(directory, overwrite=overwrite, protected=protected)
    plain = format == "compressed-tensors"
    if compressed_layers(model):
        attach(model)
    if plain:
        plain_config(model)  # says what cannot be before anything is written
    with _io_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        check = lambda: _check_replaceable(target, overwrite)  # noqa: E731
        with replacing_directory(target, check) as temporary:
            _write_processor(processor, temporary)
            for name, text in files.items():
                if (temporary / name).exists():
                    raise CheckpointError(f"{name!r} is a file of the processor; give your file another name")
                (temporary / name).write_text(text, encoding="utf-8")
            write = partial(save_plain, model) if plain else model.save_pretrained
            write(temporary, max_shard_size=max_shard_size or ("1GB" if is_away(model) else "5GB"))
            for weights in temporary.glob("*.safetensors"):  # safetensors keeps its files from other users
                shutil.copymode(temporary / "config.json", weights)
            clean_configs(temporary)
            if verify is not None:
                record |= verify(temporary) or {}
            if CARD not in files:
                (temporary / CARD).write_text(model_card(model, record, standard=plain), encoding="utf-8")
            written = {path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()}
            record |= {"spectrim_version": release(), "files": sorted({*written, PROVENANCE})}
            (temporary / PROVENANCE).write_text(_json(record), encoding="utf-8")
    return target


def check_target(target: str | Path, *, overwrite: bool, protected: Collection[str | Path] = ()) -> Path:
    """Refuse a directory that cannot become a checkpoint, or where something would be lost; returns its absolute path.

    Without `overwrite` nothing that exists is touched, but for an empty directory; with it only a directory that
    spectrim wrote and that holds nothing else is replaced. No target may be, contain or lie in one of the `protected`
    paths that exist (the model, statistics, a plan), nor be or contain the current directory. What killed runs left
    beside the target is removed, and a checkpoint that one of them had just taken away is put back.

    Raises:
        CheckpointError: names what is in the way, and the remedy.
    """
    with _io_errors(target):
        try:
            path = Path(target).expanduser()
            full = path.resolve()
        except (ValueError, RuntimeError) as error:  # a NUL, an unknown user, links in a circle
            raise CheckpointError(f"{str(target)!r} is no path ({error}); name another directory") from error
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to {full}; name the directory itself")
        for kept in protected:
            _check_apart(full, user_path(kept).resolve())
        if Path.cwd().is_relative_to(full):
            raise CheckpointError(f"{full} is or holds the current directory; name another directory")
        recover(full)
        _check_replaceable(full, overwrite)
        above = next(parent for parent in full.parents if parent.exists())
        with tempfile.TemporaryDirectory(dir=above, prefix=f".{full.name}.", suffix=".try"):
            pass  # says now, and not after hours, that nothing can be made there
    return full


def _check_apart(target: Path, kept: Path) -> None:
    if not kept.exists():
        return
    how = (
        "is" if target == kept
        else "holds" if kept.is_relative_to(target)
        else "lies in" if target.is_relative_to(kept)
        else None
    )  # fmt: skip
    if how is not None:
        raise CheckpointError(f"{target} {how} {kept}, which this run reads; name a directory apart from it")


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a directory")
    if not any(target.iterdir()):
        return
    try:
        record = read_provenance(target)
    except CheckpointError as error:
        raise CheckpointError(
            f"{target} is not empty and was not written by spectrim; name another directory"
        ) from error
    if (foreign := foreign_file(target, record)) is not None:
        raise CheckpointError(
            f"{target} is not empty and holds {foreign!r}, which spectrim did not write; name another directory, or "
            "move that file elsewhere"
        )
    if not overwrite:
        raise CheckpointError(
            f"{target} is not empty, it holds a checkpoint; name another directory, or replace it by --overwrite "
            "(overwrite=True)"
        )


def _public(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance without paths of this machine or another: sources of data by their last part."""
    record: dict[str, Any] = without_paths(dict(provenance))
    if isinstance(data := record.get("data"), dict):
        for kind in ("text", "images"):
            if isinstance(data.get(kind), str):
                data[kind] = public_name(data[kind])
            elif isinstance(data.get(kind), list):
                data[kind] = [public_name(str(source)) for source in data[kind]]
    return record


def _check_names(files: Mapping[str, str]) -> None:
    for name in files:
        plain = name and Path(name).name == name and name.isprintable()
        if name != CARD and (not plain or any(fnmatch(name, pattern) for pattern in _RESERVED)):
            raise CheckpointError(
                f"{name!r} cannot be added to a checkpoint; choose a plain name that no model file has"
            )


def _json(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the provenance is not JSON ({error}); give numbers, strings, lists and dicts"
        ) from error


def _write_processor(processor: Any, directory: Path) -> None:
    if processor is None:
        return
    if isinstance(processor, str | Path) and split_source(processor)[1] is not None:
        processor = load_processor(processor)  # a GGUF file holds its tokenizer
    if not isinstance(processor, str | Path):
        processor.save_pretrained(directory)
        return
    source = Path(processor)
    if not source.is_dir():  # a hub id: fetch what belongs to its processor, then copy it from the cache
        load_processor(processor)
        source = Path(str(cached_file(str(processor), "config.json", local_files_only=True))).parent
    for name in processor_files(source):
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, directory / name)


@contextmanager
def _io_errors(target: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise CheckpointError(f"cannot write {target} ({error}); free space or name another directory") from error
