"""Opening models and their processors, compressed and dense alike."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import quantization_config as hf_quantization

from spectrim.checkpoint.names import shortened
from spectrim.errors import CheckpointError, ModelError

PROVENANCE = "spectrim.json"

# Arguments of from_pretrained that say where files come from; the config is found with the same ones.
_WHERE = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


def load(
    directory: str | Path,
    *,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Open a model directory or hub id, dense or compressed, as the image-text model or the language model that it is.

    A GGUF file is named by its path, or as ``DIRECTORY_OR_ID::NAME.gguf``; its weights are unpacked to dense ones.
    `dtype` None keeps the dtype of the files. Other arguments are those of ``from_pretrained``. The model is in eval
    mode. Raises ModelError if there is no such model or its files lack weights, CheckpointError if a compressed
    checkpoint is damaged or written by another version.
    """
    source, gguf = _split(directory)
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    config = _config(source, gguf, where)
    auto = AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM
    if gguf is not None:
        kwargs["gguf_file"] = gguf
        if hasattr(hf_quantization, "GgufConfig"):  # earlier releases always unpack
            kwargs["quantization_config"] = hf_quantization.GgufConfig(dequantize=True)
    try:
        loaded: Any = auto.from_pretrained(
            source, device_map=device_map, dtype=dtype or "auto", output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"cannot load a model from {str(directory)!r}: {_first_line(error)}") from error
    model: PreTrainedModel
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"the files of {str(directory)!r} lack {shortened(missing)}; copy or download them again")
    return model


def read_config(directory: str | Path, where: dict[str, Any]) -> PreTrainedConfig:
    """The config of a model; sources as for `load`. Raises ModelError if there is none."""
    return _config(*_split(directory), where)


def check_dense(config_or_model: PreTrainedConfig | PreTrainedModel) -> None:
    """ModelError for a model that is compressed or quantized already."""
    config = getattr(config_or_model, "config", config_or_model)
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise ModelError(
        f"the model is compressed already (quantization method {getattr(method, 'value', method)}); start from the "
        "dense model, or dequantize it first"
    )


def load_processor(directory: str | Path, **kwargs: Any) -> Any:
    """The processor of an image-text model, or the tokenizer of a language model; sources as for `load`.

    Raises ModelError if the model comes without one, or if it needs a package that is not installed.
    """
    source, gguf = _split(directory)
    vision = sees(_config(source, gguf, {name: kwargs[name] for name in _WHERE if name in kwargs}))
    auto, kind = (AutoProcessor, "processor") if vision else (AutoTokenizer, "tokenizer")
    if gguf is not None:
        kwargs["gguf_file"] = gguf
    try:
        processor = auto.from_pretrained(source, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot load the {kind} of {str(directory)!r}: {_first_line(error)}") from error
    if vision and not hasattr(processor, "image_processor"):  # transformers falls back to the tokenizer alone
        raise ModelError(f"{str(directory)!r} has no image processor; add its preprocessor_config.json")
    return processor


def read_provenance(directory: str | Path) -> dict[str, Any]:
    """What `save` recorded about how the checkpoint came about; CheckpointError if the directory has no such record."""
    path = Path(directory) / PROVENANCE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); was the directory written by spectrim?") from error
    if not isinstance(record, dict) or not {"spectrim_version", "files"} <= record.keys():
        raise CheckpointError(f"{path} is not a record that spectrim wrote; name a directory that spectrim wrote")
    return record


def _split(source: str | Path) -> tuple[str, str | None]:
    """Directory or hub id, and the name of the GGUF file in it, if one is meant."""
    text = str(source)
    if "::" in text:
        directory, _, name = text.partition("::")
        return directory, name
    path = Path(text)
    if path.suffix == ".gguf":
        return str(path.parent), path.name
    return text, None


def _config(source: str, gguf: str | None, where: dict[str, Any]) -> PreTrainedConfig:
    if source.startswith(("/", "./", "../")) and not Path(source).exists():
        raise ModelError(f"{source} does not exist; name a model directory or a hub id")
    try:
        return AutoConfig.from_pretrained(source, **({} if gguf is None else {"gguf_file": gguf}), **where)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{source!r} is no model directory or hub id to open: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """What transformers says first; advice for other situations follows in its messages."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def sees(config: PreTrainedConfig) -> bool:
    """Whether a model of this config takes images."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
