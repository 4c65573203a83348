"""What ``save_pretrained`` writes of a model that holds compressed layers, and of every part of one.

transformers asks a quantizer for the tensors to write without showing it the ``state_dict`` that the caller gave (which
is how FSDP, ZeRO and accelerate save), and a part of a model (its language model, its tower) has no quantizer at all.
So ``PreTrainedModel.save_pretrained`` itself is wrapped: whatever model, part or new parent holds compressed layers is
written with its own share of the config.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.checkpoint.config import SpectrimConfig
from spectrim.checkpoint.names import compressed_layers, saved_names, shortened
from spectrim.checkpoint.quantizer import (
    GUARD,
    WHOLE,
    SpectrimQuantizer,
    all_configs,
    describe,
    nested,
    without_guard,
)
from spectrim.errors import CheckpointError
from spectrim.experts import fused
from spectrim.storage import StoredLayer

# What a config carries for a compressed model; and what transformers notes in it on saving, of a part as of the whole.
_MARKS = ("quantization_config", "fusion_config", "architectures")
_save_pretrained = PreTrainedModel.save_pretrained


@wraps(_save_pretrained)
def save_pretrained(
    self: PreTrainedModel,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """As transformers has it; `state_dict` is what is written. Raises CheckpointError for what could not be loaded."""
    layers = compressed_layers(self)
    adapter = getattr(self, "_hf_peft_config_loaded", False)  # then transformers writes the adapter alone
    if layers and not adapter:
        tensors = _guarded(self, layers, state_dict)
        found = describe(self, None if state_dict is None else state_dict.keys())
        state_dict = tensors
    else:
        found = None
    dense = not layers and not adapter and state_dict is None  # whose experts transformers knows fused
    with fused(self) if dense else nullcontext(), _described(self, found):
        _save_pretrained(self, save_directory, is_main_process, state_dict, *args, **kwargs)


def write_described(model: PreTrainedModel, directory: Any, quantization: dict[str, Any], **options: Any) -> None:
    """Write a model by transformers' own means with another ``quantization_config``, and nothing of this format."""
    with _described(model, describe(model)):
        for config in all_configs(model):
            without_guard(config)
        model.config.quantization_config = quantization
        _save_pretrained(model, directory, state_dict=model.state_dict(), **options)


@contextmanager
def _described(model: PreTrainedModel, found: SpectrimConfig | None) -> Iterator[None]:
    """Inside the block, the config of `model` says `found`, and those of its parts and parents nothing of this kind.

    A part often shares its config with its parent, whose names are others. A class of a part that is loaded from the
    directory of the whole sees the part's config alone: there a guard stops it.
    """
    if found is None and not any(
        isinstance(getattr(x, "quantization_config", None), SpectrimConfig)
        or {GUARD, WHOLE} & (getattr(x, "fusion_config", None) or {}).keys()
        for x in all_configs(model)
    ):
        yield
        return
    configs = {id(config): config for config in all_configs(model)}.values()
    before = [{key: vars(config)[key] for key in _MARKS if key in vars(config)} for config in configs]
    quantizer = vars(model).get("hf_quantizer")
    try:
        for config in configs:
            if isinstance(getattr(config, "quantization_config", None), SpectrimConfig):
                del config.quantization_config
            without_guard(config)
        if found is not None:
            model.config.quantization_config = found
            for config in nested(model.config):
                guard = GUARD if config is model.config else WHOLE
                config.fusion_config = {**(getattr(config, "fusion_config", None) or {}), guard: False}
        if isinstance(quantizer, SpectrimQuantizer):
            vars(model)["hf_quantizer"] = None  # transformers would ask it for other tensors than those given
        yield
    finally:
        for config, marks in zip(configs, before, strict=True):
            for key in _MARKS:
                vars(config).pop(key, None)
            vars(config).update(marks)
        if isinstance(quantizer, SpectrimQuantizer):
            vars(model)["hf_quantizer"] = quantizer
            if found is not None:
                model.config.quantization_config = quantizer.quantization_config = found


def _guarded(
    model: PreTrainedModel, layers: Mapping[str, StoredLayer], given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The tensors to write: those given, or the model's own, and an empty one in place of every compressed weight.

    Raises CheckpointError for given tensors that are not in the form that the model has.
    """
    tensors: dict[str, Any] = dict(model.state_dict() if given is None else given)
    for name, layer in layers.items():
        # From the layer's sizes: its tensors may be shards, or elsewhere.
        wanted = {f"{name}.{key}": tuple(tensor.shape) for key, tensor in layer.expected().items()}
        if missing := sorted(wanted.keys() - tensors.keys()):
            raise CheckpointError(f"the state_dict lacks {shortened(missing)}; give all tensors of the model")
        wanted.setdefault(f"{name}.weight", (0,))
        if wrong := [key for key, size in wanted.items() if key in tensors and tuple(tensors[key].shape) != size]:
            raise CheckpointError(
                f"the state_dict holds {shortened(wrong)} in another shape than {name} has; give the state_dict of "
                "this very model"
            )
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), model.dtype)
    for name in saved_names(model, [f"{name}.weight" for name in layers]):
        tensors[name] = torch.empty(0, dtype=dtype)  # those that the format merges with others stand without the guard
    return tensors


PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]
