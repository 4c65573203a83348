"""Opening models and their processors, compressed and dense alike."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import quantization_config as hf_quantization
from transformers.utils.hub import cached_file

from spectrim import files, latent
from spectrim.checkpoint.apart import ExpertsApart, as_dense
from spectrim.checkpoint.config import METHOD, latent_options
from spectrim.checkpoint.model_files import CONFIGS, PROVENANCE, processor_files
from spectrim.checkpoint.names import shortened
from spectrim.checkpoint.offload import places, too_large
from spectrim.checkpoint.sources import NO_MODEL, WHERE, failure, loader, read_config, read_object, sees, split_source
from spectrim.checkpoint.weights import check_weights, holds_fused, weight_files
from spectrim.dense import quantization
from spectrim.errors import CheckpointError, ModelError, SpectrimError, printable
from spectrim.experts import unfuse, unfused
from spectrim.storage.runtime import RUNTIMES, set_runtime
from spectrim.trace import as_traced

logger = logging.getLogger(__name__)

# Arguments of from_pretrained by which weights come from elsewhere than the directory's usual files.
_ELSEWHERE = ("state_dict", "use_safetensors", "variant", "weights_only")


def load(
    directory: str | Path,
    *,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    runtime: str | None = None,
    latent_cache: bool | str | None = None,
    memory: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Open a model directory or hub id, dense or compressed, as the image-text model or the language model that it is.

    A GGUF file is named by its path, or as ``DIRECTORY_OR_ID::NAME.gguf``; its weights are unpacked to dense ones.
    `dtype` None keeps the dtype of the files; that of an unpacked GGUF file is bfloat16. `runtime` says how integers
    run: ``auto``, ``speed``, ``memory`` or ``reference`` (see ``storage.packed.PackedLinear``); None as the checkpoint
    says. `latent_cache` true lets every ``generate`` keep latents in place of keys and values (`spectrim.LatentCache`),
    ``"int8"`` latents in integers, ``"folded"`` and ``"int8-folded"`` these with A_v multiplied into the output
    projection; None as the checkpoint says. With a `memory` such as ``"8GiB"`` of which the weights
    of a local dense model would take more than half, blocks stay in their files and come in when they run, on the CPU;
    None loads all. Other arguments are those of ``from_pretrained``. Code
    that a model brings is run with ``trust_remote_code=True`` only; nothing asks. The model is in eval mode.

    Raises:
        ModelError: there is no such model, it is of another kind, or its files are damaged or lack weights; names the
            file and the remedy. A latent cache was asked for that the model cannot use.
        CheckpointError: a compressed checkpoint is damaged or written by another version.
    """
    if runtime not in (None, *RUNTIMES):
        raise ModelError(f"there is no runtime {runtime!r}; choose from {', '.join(RUNTIMES)}")
    asked = None if latent_cache is None else latent_options(latent_cache)
    kwargs.setdefault("trust_remote_code", False)
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    config = read_config(directory, where)
    auto = loader(directory, config, trusted=bool(kwargs["trust_remote_code"]))
    source, gguf = split_source(directory)
    if gguf is not None:
        kwargs["gguf_file"] = gguf
        if hasattr(hf_quantization, "GgufConfig"):  # earlier releases always unpack
            kwargs["quantization_config"] = hf_quantization.GgufConfig(dequantize=True)
        if dtype is None:
            dtype = torch.bfloat16
            logger.warning(
                "%s: weights are unpacked to bfloat16, and bytes are counted against that; --dtype chooses another",
                printable(gguf),
            )
    local = gguf is None and Path(source).is_dir()
    quantized = gguf is not None or "quantization_config" in kwargs
    if local:
        _check_files(Path(source), config, kwargs, quantized=quantized)
    options = {"output_loading_info": True, **kwargs}
    empty, apart = None, False
    dense = local and not quantized and quantization(config) is None
    held = _dtype(dtype) or _dtype(getattr(config, "dtype", None))
    if memory is not None and dense and device_map in (None, "cpu") and too_large(Path(source), memory, held):
        empty = load_empty(source, dtype=held, trust_remote_code=bool(kwargs["trust_remote_code"]))
        device_map = places(empty)
        if apart := any(unfused(module) for module in empty.modules()):
            options["quantization_config"] = ExpertsApart(fused=holds_fused(weight_files(Path(source))))
    try:
        try:
            loaded: Any = auto.from_pretrained(source, device_map=device_map, dtype=dtype or "auto", **options)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            # The message has no names. Once more, without memory for what the config claims, for the report that has.
            options["ignore_mismatched_sizes"] = True
            _, report = auto.from_pretrained(source, device_map="meta", dtype=dtype or "auto", **options)
            name, stored, wanted = sorted(report["mismatched_keys"])[0]
            raise ModelError(
                f"the files of {str(directory)!r} hold {name} in the shape {list(stored)} and config.json wants "
                f"{list(wanted)}; copy config.json and the weights again, of one and the same model"
            ) from error
    except SpectrimError as error:
        if str(directory) in str(error):
            raise
        raise type(error)(f"{directory}: {error}") from error
    except Exception as error:  # files are somebody else's, and what reads them may raise anything
        if empty is not None and "offload_folder" in str(error):
            raise ModelError(
                f"the files of {str(directory)!r} hold tensors in another way than the model, so that it is not read "
                f"block by block, and it is larger than half of {memory}; raise the memory"
            ) from error
        raise failure("model", directory, error) from error
    model: PreTrainedModel
    model, report = loaded
    if apart:
        as_dense(model)
    if not local and gguf is None:  # a hub id, whose files are in the cache now
        cached = cached_file(source, "config.json", **{**where, "local_files_only": True})
        _check_files(Path(str(cached)).parent, config, {**kwargs, "subfolder": ""}, quantized=quantized)
    if missing := sorted(report["missing_keys"]):
        named = next(iter(getattr(config, "architectures", None) or ()), type(model).__name__)
        if named != type(model).__name__:
            raise ModelError(f"{directory} is a {named}, {NO_MODEL}: its files lack {shortened(missing)}")
        raise ModelError(f"the files of {str(directory)!r} lack {shortened(missing)}; copy or download them again")
    if gguf is not None:  # else what is saved would be named after the directory
        model.name_or_path = model.config.name_or_path = str(directory)
    if empty is not None:
        unfuse(model)  # and what its files hold fused is read one expert at a time
        as_traced(model, empty)
    if runtime is not None:
        set_runtime(model, runtime)
    if asked is not None:
        latent.use_latent_cache(model, *asked)
    elif latent_cache is not None:
        latent.use_ordinary_cache(model)
    return model


def _dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype as `load` takes it; None for that of the files."""
    found = getattr(torch, name, None) if isinstance(name, str) else name
    return found if isinstance(found, torch.dtype) else None


def load_empty(
    directory: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model without values, on the meta device: of its files the config alone is read. Sources as for `load`.

    `dtype` None is the one that `load` chooses. Raises ModelError for a config that makes no model.
    """
    config = read_config(directory, {"trust_remote_code": trust_remote_code})
    auto = loader(directory, config, trusted=trust_remote_code)
    unpacked = torch.bfloat16 if split_source(directory)[1] is not None else getattr(config, "dtype", None)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(
                config, dtype=dtype or unpacked or torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # as in `load`
        raise failure("model", directory, error) from error
    return model.eval()


def load_processor(directory: str | Path, **kwargs: Any) -> Any:
    """The processor of an image-text model, or the tokenizer of a language model; sources as for `load`.

    Raises ModelError if the model comes without one, or if it needs a package that is not installed or code of its own
    (see `load`).
    """
    kwargs.setdefault("trust_remote_code", False)
    config = read_config(directory, {name: kwargs[name] for name in WHERE if name in kwargs})
    loader(directory, config, trusted=bool(kwargs["trust_remote_code"]))
    vision = sees(config)
    auto, kind = (AutoProcessor, "processor") if vision else (AutoTokenizer, "tokenizer")
    source, gguf = split_source(directory)
    if gguf is not None:
        kwargs["gguf_file"] = gguf
    if local := gguf is None and Path(source).is_dir():
        for name in {*CONFIGS, "chat_template.json"} & {*processor_files(Path(source))}:
            read_object(Path(source, name))  # transformers does without some that it cannot read
    try:
        processor = auto.from_pretrained(source, **kwargs)
    except Exception as error:  # as in `load`
        if local:
            _check_vocabulary(Path(source))
        raise failure(kind, directory, error) from error
    if vision and not hasattr(processor, "image_processor"):  # transformers falls back to the tokenizer alone
        raise ModelError(f"{str(directory)!r} has no image processor; add its preprocessor_config.json")
    tokenizer = getattr(processor, "tokenizer", processor)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # some classes are made without any file
        raise ModelError(
            f"the tokenizer of {str(directory)!r} has no vocabulary; add the tokenizer.json of its base model"
        )
    return processor


def read_provenance(directory: str | Path) -> dict[str, Any]:
    """What `save` recorded about how the checkpoint came about; CheckpointError if the directory has no such record."""
    path = Path(directory) / PROVENANCE
    try:
        record = files.read_object(path)
    except ValueError as error:
        raise CheckpointError(f"{error}; was the directory written by spectrim?") from error
    names = record.get("files")
    if "spectrim_version" not in record or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise CheckpointError(f"{path} is not a record that spectrim wrote; name a directory that spectrim wrote")
    return record


def _check_files(directory: Path, config: PreTrainedConfig, kwargs: dict[str, Any], *, quantized: bool) -> None:
    """Look into the weight files before (or, of a hub, after) they are loaded."""
    if any(kwargs.get(name) is not None for name in _ELSEWHERE) or getattr(config, "transformers_weights", None):
        return
    method = quantization(config)
    known = method is not None and any(name.startswith(method) for name in AUTO_QUANTIZATION_CONFIG_MAPPING)
    error: type[SpectrimError] = CheckpointError if method == METHOD else ModelError
    check_weights(weight_files(directory / kwargs.get("subfolder", "")), error, quantized=quantized or known)


def _check_vocabulary(directory: Path) -> None:
    """Name the file that keeps a tokenizer from loading, where it can be told."""
    names = processor_files(directory)
    if not any(name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece", "tekken")) for name in names):
        raise ModelError(
            f"cannot load the tokenizer of {directory}, which has none; add the tokenizer.json of its base model"
        )
    for name in names:
        if name.endswith(".json"):
            read_object(directory / name)
