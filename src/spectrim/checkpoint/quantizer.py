"""How transformers learns to load, save and merge a checkpoint with compressed linears (see ``config``).

Opened without this module, transformers only logs a warning about an unknown quantization method, and fills every
factored layer with random weights. Two guards in the checkpoint make that an error:

- ``fusion_config`` in config.json names a module fusion that only this module registers, and that is switched off;
  transformers refuses a name that it does not know, and its message contains the name: our sentence.
- Every factored or packed linear also has an empty tensor ``name.weight``. Where a dense weight is expected, its shape
  does not fit; this stops transformers 4, too, which knows nothing of fusions. A loader of factors skips them.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, fusion_mapping
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from spectrim import latent
from spectrim.checkpoint.apart import not_quantized
from spectrim.checkpoint.config import METHOD, SpectrimConfig, latent_options
from spectrim.checkpoint.names import compressed_layers, runtime_names, shortened, stored_layers
from spectrim.checkpoint.weights import FUSED
from spectrim.errors import CheckpointError, ModelError
from spectrim.experts import fuse, loads_as_is, unfuse
from spectrim.storage import StoredLayer, exchange, form, share, unshare
from spectrim.storage.runtime import set_runtime

GUARD = (
    "the layers of this checkpoint are factored: `pip install spectrim` and `import spectrim` before from_pretrained"
)
# The same in the config of a part inside that of the whole. It is no fusion here either: no part loads from the whole.
WHOLE = "this is a part of a compressed checkpoint: load the whole by its own class, and take the part out of it"

# The method by which transformers, after loading, shows a model the report of missing, unexpected and misshapen keys.
_REPORT = "_adjust_missing_and_unexpected_keys"

# A fusion spec that fuses nothing: it makes the guard's name known.
fusion_mapping._FUSION_REGISTRY[GUARD] = fusion_mapping.ModuleFusionSpec()


@register_quantizer(METHOD)
class SpectrimQuantizer(HfQuantizer):
    """Exchanges dense linears for factored ones before loading, and back on ``model.dequantize()``."""

    requires_calibration = True  # a dense checkpoint cannot be factored while it is loaded
    quantization_config: SpectrimConfig

    def __init__(self, quantization_config: SpectrimConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._complete = False
        self._source = "the checkpoint"
        self._kinds: dict[str, tuple[torch.Size, bool]] = {}  # shapes of all tensors, and whether they are floats

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Swap the linears on the meta device, and have every missing tensor reported as an error."""
        if checkpoint_files:
            self._source = str(Path(checkpoint_files[0]).parent)
        layers = self.quantization_config.layers()
        tensors = None if checkpoint_files is None else _stored_tensors(checkpoint_files)
        if not any(FUSED.search(name) for name in tensors or ()):  # as earlier releases left experts
            unfuse(model)
        try:
            markers = {f"{name}.{form(kind).marker}" for name, (kind, _) in layers.items()}  # all forms are known
            if tensors is not None and (missing := sorted(markers - tensors.keys())):
                raise CheckpointError(
                    f"{self._source} lacks the tensor {shortened(missing)}; copy or compress it again"
                )
            names = runtime_names(model, layers, tensors)
            if dense := sorted(name for name in names if (tensors or {}).get(f"{name}.weight", (0, ""))[0]):
                raise CheckpointError(
                    f"{self._source} holds dense weights of {shortened(dense)}, which its config says to be factored "
                    "or packed; copy or compress it again"
                )
            exchange(model, {names[name]: layer for name, layer in layers.items()})
            share(model)
        except ModelError as error:
            raise CheckpointError(
                f"quantization_config does not fit the model: {error}; copy config.json of {self._source} again"
            ) from error
        self._check_words(model, names, tensors or {})
        self._kinds = {name: _kind(tensor) for name, tensor in model.state_dict().items()}
        sentinels = {f"{name}.weight" for name in names.values()}
        inside = tuple(f"{name}." for name in names.values())
        # Some models initialize `module.q_proj.weight` from the parent, where there is no such weight any more. Parents
        # without buffers of their own need no initialization: all their parameters come from the file or are reported.
        parents = {name.rpartition(".")[0] for name in names.values()} - {""}
        ready = {name for name in parents if not any(True for _ in model.get_submodule(name).buffers(recurse=False))}
        for name in ready:
            vars(model.get_submodule(name))["_is_hf_initialized"] = True
        adjust: Callable[[Any], None] = getattr(model, _REPORT)

        def adjust_and_check(report: Any) -> None:
            absent = report.missing_and_mismatched()
            adjust(report)  # drops what the model's class may lack and initializes itself
            report.unexpected_keys -= sentinels
            missing = report.missing_and_mismatched() | {key for key in absent if key.rpartition(".")[0] in ready}
            if missing:
                report.missing_keys, report.mismatched_keys = set(), set()  # ours is the message that counts
                raise CheckpointError(
                    f"{self._source} lacks {shortened(sorted(missing))}, or holds them in another shape; copy or "
                    "compress it again"
                )
            if strange := sorted(key for key in report.unexpected_keys if key.startswith(inside)):
                raise CheckpointError(
                    f"{self._source} holds {shortened(strange)}, of which its config says nothing; copy or compress it "
                    "again"
                )
            self._complete = True

        vars(model)[_REPORT] = adjust_and_check
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self._complete:
            raise CheckpointError(
                "transformers did not report which tensors it loaded, so random weights cannot be ruled out; load the "
                "checkpoint from its safetensors files with a transformers release that spectrim was tested with"
            )
        del vars(model)[_REPORT]
        # transformers before 5.23 takes tensors of any shape for a model with a quantizer.
        held = model.state_dict()
        misfits = {name for name, kind in self._kinds.items() if name in held and _kind(held[name]) != kind}
        if misfits:
            raise CheckpointError(
                f"{self._source} holds {shortened(sorted(misfits))} in another shape or kind than its config says; "
                "copy or compress it again"
            )
        if broken := [
            f"{name}.{part}"
            for name, layer in compressed_layers(model).items()
            for part, tensor in layer.state_dict().items()
            if tensor.is_floating_point() and not tensor.is_meta and not _finite(tensor)
        ]:
            raise CheckpointError(
                f"{self._source} holds NaN or infinity in {shortened(broken)}; copy or compress it again"
            )
        for name, module in model.named_modules():
            if isinstance(module, StoredLayer):
                try:
                    module.loaded()
                except ModelError as error:
                    raise CheckpointError(f"{name}.{error}; copy or compress {self._source} again") from error
        # On CPU the parameters are views of the mapped file, aligned to 8 bytes only, where some kernels sum in another
        # order. Copies aligned like any new tensor give the logits from before saving, to the last bit.
        for parameter in model.parameters():
            if type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        set_runtime(model, self.quantization_config.runtime)
        if (asked := latent_options(self.quantization_config.latent_cache)) and model.can_generate():
            latent.use_latent_cache(model, *asked)
        vars(model)["is_quantized"] = False  # the factors are ordinary floats; half(), float() and fine-tuning are fine
        return model

    def _check_words(
        self, model: PreTrainedModel, names: Mapping[str, str], tensors: Mapping[str, tuple[int, str]]
    ) -> None:
        """Raises CheckpointError for integers that the file stores as floats: transformers would round them."""
        for stored, name in names.items():
            for key, tensor in model.get_submodule(name).state_dict().items():
                kind = tensors.get(f"{stored}.{key}", (0, "I"))[1]
                if not tensor.is_floating_point() and kind[0] not in "IUB":
                    raise CheckpointError(
                        f"{self._source} holds {stored}.{key} as {kind}, which should be integers; copy it again"
                    )

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Merge factors and unpack integers into dense linears, in place, and make `model` a plain one."""
        dense = {name: layer.to_dense() for name, layer in compressed_layers(model).items()}
        latent.use_ordinary_cache(model)
        for name, linear in dense.items():
            model.set_submodule(name, linear if dtype is None else linear.to(dtype))
        unshare(model)
        fuse(model)
        self.remove_quantization_config(model)
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Take every trace of the factored format off a model that is dense again."""
        super().remove_quantization_config(model)  # type: ignore[no-untyped-call]
        not_quantized(model)
        for config in all_configs(model):
            without_guard(config)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """What transformers converts while it loads, but for the merging of experts, which are linears here.

        The releases that vLLM wants give no model, and load no experts of ours.
        """
        found: list[Any] = super().update_weight_conversions(weight_conversions, *model)  # type: ignore[no-untyped-call]
        return loads_as_is(found, *model) if model else found

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The factors are ordinary tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters: full fine-tuning and adapters both work."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """As `is_trainable`: transformers asks this before full fine-tuning."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Two matrix products, no custom kernels."""
        return True


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model that holds stored layers one that transformers saves, merges and re-loads.

    Sets ``model.config.quantization_config`` (forms by checkpoint name), the guard and
    ``model.hf_quantizer``; returns `model`. Afterwards ``model.save_pretrained`` and ``model.dequantize`` work. Raises
    ModelError if there is no such layer, CheckpointError if one cannot be stored or if the model is quantized in
    another way.
    """
    found = describe(model)
    model.config.quantization_config = found
    model.config.fusion_config = {**(getattr(model.config, "fusion_config", None) or {}), GUARD: False}
    vars(model)["hf_quantizer"] = SpectrimQuantizer(found)
    return model


def describe(model: PreTrainedModel, keys: Collection[str] | None = None) -> SpectrimConfig:
    """What ``quantization_config`` says of the compressed layers of `model`, by the names of its own checkpoint.

    `keys` are the names of its tensors, where the model does not hold them itself. Raises as `attach` does.
    """
    present = getattr(model.config, "quantization_config", None)
    if present is not None and not isinstance(present, SpectrimConfig):
        raise CheckpointError("the model is already quantized in another way; compress the unquantized model")
    layers = compressed_layers(model)
    if not layers:
        raise ModelError("the model holds no factored layer and no packed one; save it with its own save_pretrained")
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    if shared := [name for name, x in layers.items() if f"{name}.weight" in tied and not getattr(x, "shared", False)]:
        raise CheckpointError(f"{shortened(shared)} shares its weight with another layer; keep it dense")
    stored = stored_layers(model, keys)
    return SpectrimConfig.of({name: (layer.form, layer.spec) for name, layer in stored.items()})


def without_guard(config: PreTrainedConfig) -> None:
    """Take the guards off a config, and leave other fusions."""
    fusions = vars(config).pop("fusion_config", None) or {}
    if fusions := {name: options for name, options in fusions.items() if name not in (GUARD, WHOLE)}:
        config.fusion_config = fusions


def all_configs(model: nn.Module) -> Iterator[PreTrainedConfig]:
    """The configs of a model and of all its parts; some of them more than once."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            yield from nested(module.config)


def nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those inside it."""
    yield config
    for name in config.sub_configs:
        if isinstance(inner := getattr(config, name, None), PreTrainedConfig):
            yield from nested(inner)


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, bool]:
    return tensor.shape, tensor.is_floating_point()


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())  # both ends are NaN where one is


def _stored_tensors(files: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Names of all tensors in safetensors files, with the numbers of their elements and their dtypes (I32, F16, …).

    Raises CheckpointError for a truncated or foreign file.
    """
    stored: dict[str, tuple[int, str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    part = tensors.get_slice(name)
                    stored[name] = prod(part.get_shape()), part.get_dtype()
        except SafetensorError as error:
            raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}); copy it again") from error
    return stored
