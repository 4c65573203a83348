"""Where a model is (a directory, a hub id, a GGUF file), and its config, checked before anything is loaded."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import GENERATION_CONFIG_NAME

from spectrim import files
from spectrim.errors import ModelError, SpectrimError

# Arguments of from_pretrained that say where files come from; the config is found with the same ones.
WHERE = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")

NO_MODEL = "and is no language model or image-text model; name one"
_DTYPES = ("float64", "float32", "bfloat16", "float16")


def split_source(source: str | Path) -> tuple[str, str | None]:
    """Directory or hub id, and the name of the GGUF file in it, if one is meant."""
    text = str(source)
    if "::" in text:
        directory, _, name = text.partition("::")
        return directory, name
    path = Path(text)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return str(path.parent), path.name
    return text, None


def local_files(source: str | Path) -> Path | None:
    """The directory or the GGUF file that a source names; None for a hub id."""
    directory, gguf = split_source(source)
    path = Path(directory) if gguf is None else Path(directory, gguf)
    return path if directory and path.exists() else None


def read_config(source: str | Path, where: dict[str, Any]) -> PreTrainedConfig:
    """The config of a model; `where` holds arguments of from_pretrained that are in `WHERE`.

    Raises:
        ModelError: there is no such model, or its config cannot be read; names the file and the remedy.
    """
    where = {"trust_remote_code": False, **where}  # None would ask
    name, gguf = split_source(source)
    written_as_path = name.startswith(("/", "./", "../", "~")) or gguf is not None
    if gguf is not None and (not name or Path(name).is_dir() or "::" not in str(source)):
        if not Path(name, gguf).is_file():
            raise ModelError(f"{Path(name, gguf)} does not exist; name a GGUF file")
        if find_spec("gguf") is None:
            raise ModelError(f"reading {Path(name, gguf)} needs the package gguf: pip install 'spectrim[gguf]'")
    elif Path(name).is_dir():
        _check_config_file(Path(name, where.get("subfolder", "")), trusted=bool(where.get("trust_remote_code")))
    elif Path(name).exists():
        raise ModelError(f"{name} is a file; name a model directory, a GGUF file or a hub id")
    elif written_as_path and gguf is None:
        raise ModelError(f"{name} does not exist; name a model directory or a hub id")
    try:
        return AutoConfig.from_pretrained(name, **({} if gguf is None else {"gguf_file": gguf}), **where)
    except SpectrimError:
        raise
    except Exception as error:  # a config is somebody else's, and its class may raise anything over it
        raise failure("config", source, error) from error


def _check_config_file(directory: Path, *, trusted: bool) -> None:
    path = directory / "config.json"
    if not path.is_file():
        if (directory / "adapter_config.json").is_file():
            raise ModelError(f"{directory} is no model directory but an adapter; merge it into its model and save that")
        if gguf := sorted(directory.glob("*.gguf")):
            raise ModelError(f"{directory} is no model directory, it has no config.json; name its GGUF file {gguf[0]}")
        raise ModelError(f"{directory} is no model directory, it has no config.json; name one, or a hub id")
    config = read_object(path)
    if (directory / GENERATION_CONFIG_NAME).is_file():
        read_object(directory / GENERATION_CONFIG_NAME)  # transformers goes on without one that it cannot read
    for part in (config, *(config.get(name) for name in ("text_config", "vision_config"))):
        entries = part if isinstance(part, dict) else {}
        for key in ("dtype", "torch_dtype"):
            if entries.get(key) not in (None, "auto", *_DTYPES):
                raise ModelError(f"{path} gives the {key} {entries[key]!r}; correct it to one of {', '.join(_DTYPES)}")
    auto_map = config.get("auto_map")
    if auto_map is not None and not isinstance(auto_map, dict):
        raise ModelError(f"{path} has an auto_map that is no JSON object; copy it again")
    kind, own_code = config.get("model_type"), "AutoConfig" in (auto_map or {})
    if own_code and (trusted or kind not in transformers.CONFIG_MAPPING):
        return
    if not isinstance(kind, str) or not kind:
        raise ModelError(f"{path} names no model_type, so it is no config of transformers; copy the model's own")
    if kind not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"{path} names the model_type {kind!r}, which transformers {transformers.__version__} does not know; "
            f"upgrade transformers, or name a language model or image-text model that it knows"
        )


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model; ModelError, which names the file, for anything else."""
    try:
        return files.read_object(path)
    except ValueError as error:
        raise ModelError(f"{error}; copy it again") from error


def loader(source: str | Path, config: PreTrainedConfig, *, trusted: bool) -> Any:
    """The Auto class that opens a model of this config.

    Raises:
        ModelError: it is another kind of model.
    """
    auto = AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM
    own = trusted and auto.__name__ in (getattr(config, "auto_map", None) or {})
    if not own and not sees(config) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{source} is a {config.model_type}, {NO_MODEL}")
    # Some configs are those of encoders, too, which have a class for either.
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    generative = {*_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *_names(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)}
    if not own and _other_task(named) and named not in generative:
        raise ModelError(f"{source} is a {named}, {NO_MODEL}")
    return auto


def sees(config: PreTrainedConfig) -> bool:
    """Whether a model of this config takes images."""
    own = getattr(config, "auto_map", None) or {}
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or AutoModelForImageTextToText.__name__ in own


def _names(mapping: Any) -> list[str]:
    return [name for value in mapping.values() for name in ([value] if isinstance(value, str) else value)]


def _other_task(name: Any) -> bool:
    """Whether transformers has a class of this name that is for one task, and not a model without a head."""
    return isinstance(name, str) and "For" in name and hasattr(transformers, name)


def failure(part: str, source: str | Path, error: Exception) -> ModelError:
    """The error, with its remedy, for an exception of transformers while it reads the `part` of a model."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    first = lines[: 2 if lines[0].endswith(":") else 1]  # advice for other situations follows
    said = f"{type(error).__name__}: {' '.join(' '.join(first).split()).rstrip('.')}"
    place, gguf = split_source(source)
    local = Path(place) if gguf is None else Path(place, gguf)
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{source} brings Python code of its own (auto_map), which is not run unless you allow it; read it, and if "
            "you trust it give --trust-remote-code (trust_remote_code=True)"
        )
    if isinstance(error, ImportError):
        return ModelError(f"the {part} of {source} needs a package that is not installed ({said}); install it")
    if not local.exists():
        return ModelError(
            f"{str(source)!r} is no model directory or hub id to open: cannot load the {part} ({said}); check the name "
            "and the network"
        )
    if gguf is not None:
        return ModelError(
            f"{source} is truncated, no GGUF file, or of a kind that transformers cannot unpack ({said}); download it "
            "again, or name the model directory that it was made of"
        )
    if (local / "adapter_config.json").is_file():
        return ModelError(f"cannot load the {part} of {source} ({said}); move its adapter_config.json elsewhere")
    copied = {
        "config": "config.json",
        "model": "config.json and the weights, of one and the same model,",
        "processor": "its preprocessor, processor and tokenizer files",
        "tokenizer": "its tokenizer.json and tokenizer_config.json",
    }[part]
    return ModelError(f"cannot load the {part} of {source} ({said}); copy {copied} again")
