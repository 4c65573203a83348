"""Dense mixtures that are read block by block: nothing of their experts is merged, transposed or written anew.

Where files name experts one by one, they are linears of their own before transformers looks for tensors. Where files
hold them fused, each tensor is taken as it lies there, and `experts.unfuse` reads one expert of it at a time.
transformers lets a quantizer change a model and its conversions before files are read, so this is one; it leaves no
trace.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spectrim.checkpoint.weights import FUSED
from spectrim.experts import loads_as_is, unfuse

_METHOD = "spectrim-experts-apart"


@register_quantization_config(_METHOD)
class ExpertsApart(QuantizationConfigMixin):
    """The ``quantization_config`` of that; `fused`: the files hold the experts of a layer in one tensor."""

    def __init__(self, *, fused: bool = False) -> None:
        self.quant_method: Any = _METHOD
        self.fused = fused


@register_quantizer(_METHOD)
class _Apart(HfQuantizer):
    requires_calibration = False
    quantization_config: ExpertsApart

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.quantization_config.fused:
            unfuse(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """What transformers converts while it loads, but for what it would do to experts."""
        found: list[Any] = super().update_weight_conversions(weight_conversions, *model)  # type: ignore[no-untyped-call]
        return loads_as_is([one for one in found if not _transposes(one)], *model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The weights are those of a dense model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """They are."""
        return True


def _transposes(one: Any) -> bool:
    """Whether a conversion transposes a tensor of experts if its shape says so, as reading one expert does, too."""
    return (
        isinstance(one, WeightConverter)
        and any(FUSED.search(name) for name in one.source_patterns)
        and all(isinstance(step, Transpose) and step.check_dims for step in one.operations)
    )


def as_dense(model: PreTrainedModel) -> None:
    """Take off a loaded model what says that it was loaded so."""
    quantizer: Any = model.hf_quantizer
    conversions = vars(model).get("_weight_conversions")
    quantizer.remove_quantization_config(model)
    if conversions is not None:
        vars(model)["_weight_conversions"] = conversions  # by which files name tensors
    not_quantized(model)


def not_quantized(model: nn.Module) -> None:
    """Take off the configs of a model and its parts the mark that transformers leaves on those of quantized models."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
            del module.config._is_quantized
