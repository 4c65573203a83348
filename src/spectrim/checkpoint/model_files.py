"""Which files a model is made of: what a checkpoint takes from its source, and what of it goes to a hub.

A model directory holds what its user put there: keys, notes, logs, code, adapters, statistics. Only files with a name
that transformers (or a licence) gives them are taken, and no link is followed out of the directory.
"""

import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    VIDEO_PROCESSOR_NAME,
)
from transformers.utils.hub import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

from spectrim.files import parse_json

CARD = "README.md"
PROVENANCE = "spectrim.json"

# Configs of a processor or a tokenizer: JSON in which whoever saved it may have left paths and names of code.
CONFIGS = (
    "tokenizer_config.json", PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, AUDIO_TOKENIZER_NAME
)  # fmt: skip

# Vocabularies: the names of VOCAB_FILES_NAMES in transformers' tokenizers, and those of mistral-common and tiktoken.
_PROCESSOR = (
    *CONFIGS, CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, f"{CHAT_TEMPLATE_DIR}/*.jinja",
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "tokenizer.model.v*", "spiece.model", "sentencepiece*.model", "spm.model", "spm_char.model",
    "source.spm", "target.spm", "bpe.codes", "dict.txt", "emoji.json", "entity_vocab.json", "word_shape.json",
    "word_pronunciation.json", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "prophetnet.tokenizer",
    "normalizer.json", "byte_maps.json", "tekken.json", "SYSTEM_PROMPT.txt", "*.tiktoken", "tiktoken.model",
)  # fmt: skip
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-[0-9]*-of-[0-9]*.safetensors")
_MODEL = (CONFIG_NAME, GENERATION_CONFIG_NAME, CARD, PROVENANCE, "plan.json", *_WEIGHTS)
_TERMS = re.compile(
    r"((model[-_])?licen[cs]e([-_](?![\w-]*(key|secret|token|password))[\w-]+)?|notices?|copying|copyright|authors|patents"
    r"|(acceptable[-_])?use[-_]policy|terms[-_]of[-_](use|service)|third[-_]?party[-_]?notices?)"
    r"(\.\d+)*(\.(txt|md|rst|pdf|html))?",
    re.IGNORECASE,
)

# Entries of configs that hold where something came from, and not what it is.
_ORIGIN = re.compile(r"name_or_path$|_(file|path|dir)$")


def processor_files(source: Path) -> list[str]:
    """Names of the processor's, the tokenizer's and the licence's files in a model directory, relative to it."""
    return [name for name in _inside(source) if _matches(name, _PROCESSOR) or _TERMS.fullmatch(name)]


def checkpoint_files(directory: Path, record: dict[str, Any]) -> list[str]:
    """Names of the files of a checkpoint that spectrim wrote or that a model is made of; `record` is its provenance."""
    written = set(record["files"])
    return [
        name
        for name in _inside(directory)
        if name in written or _matches(name, (*_MODEL, *_PROCESSOR)) or _TERMS.fullmatch(name)
    ]


def all_files(directory: Path) -> list[str]:
    """Names of all files and links below a directory, relative to it."""
    return [name for name in _everything(directory) if not (directory / name).is_dir()]


def foreign_file(directory: Path, record: dict[str, Any]) -> str | None:
    """The first thing in a checkpoint that spectrim did not write, relative to it; None if there is none."""
    files: list[str] = record["files"]
    # Records of before 0.2 name what was added to the model, and not all files.
    own = set(files) if PROVENANCE in files else {*files, *checkpoint_files(directory, record)}
    parents = {str(parent) for name in own for parent in PurePosixPath(name).parents}
    for name in _everything(directory):
        path = directory / name
        if name not in own and not (name in parents and path.is_dir() and not path.is_symlink()):
            return name
    return None


def public_name(source: str) -> str:
    """A name of data or of a model as others may see it: of a path, local or of another machine, the last part."""
    path = PureWindowsPath(source) if PureWindowsPath(source).drive else PurePosixPath(source)
    local = path.is_absolute() or source.startswith((".", "~")) or os.path.lexists(source)
    return path.name or "." if local else source


def without_paths(value: Any, key: str = "") -> Any:
    """JSON without paths of a machine: those that exist here, and all where the key says that it is an origin."""
    if isinstance(value, dict):
        return {name: without_paths(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item, key) for item in value]
    if not isinstance(value, str):
        return value
    here = value.startswith("/") and value.count("/") > 1 and os.path.lexists(value)
    return public_name(value) if here or _ORIGIN.search(key) else value


def clean_configs(directory: Path) -> None:
    """Take paths of this machine, and names of code that is not there, out of the configs of a new checkpoint."""
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME, *CONFIGS):
        path = directory / name
        try:
            before = parse_json(path.read_bytes())
        except (OSError, ValueError):  # there is none, or one that its reader will name
            continue
        after = without_paths(before)
        if isinstance(after, dict) and not _has_code(directory, after.get("auto_map")):
            after.pop("auto_map", None)
        if after != before:  # else it stays byte for byte
            path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _has_code(directory: Path, auto_map: Any) -> bool:
    """Whether the modules that an ``auto_map`` names are in the directory, or in a repository that it names."""
    entries = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    names = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry]) if name]
    return all("--" in str(name) or (directory / f"{str(name).split('.')[0]}.py").is_file() for name in names)


def _inside(directory: Path) -> Iterator[str]:
    """Every file below a directory, as a relative path, but for links that lead out of it (and of its hub cache)."""
    home = directory.resolve()
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):  # links into its blobs/
        home = home.parent.parent
    for name in _everything(directory):
        path = directory / name
        if name.isprintable() and path.is_file() and path.resolve().is_relative_to(home):
            yield name


def _everything(directory: Path) -> Iterator[str]:
    """Relative paths of all entries below a directory, in order; links to directories are not entered."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        yield entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{name}" for name in _everything(Path(entry.path)))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
