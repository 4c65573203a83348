"""Whether a model is dense: only plain float weights can be calibrated, decomposed and compressed."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from spectrim.errors import ModelError

_KEYS = ("quantization_config", "compression_config")  # the second is of compressed-tensors before 0.8
_PACKED = ("qweight", "weight_packed", "weight_q", "_weight_qdata")  # buffers and parameters that hold packed integers


def check_dense(model: PreTrainedConfig | PreTrainedModel) -> None:
    """Refuse a model that is quantized already, or whose config says that its weights are.

    A config that has its weights unpacked while they are loaded (``dequantize``) is one of a dense model.

    Raises:
        ModelError: names the method, or a weight that is no float, and the remedy.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    method = quantization(config, unpacked=False)
    if method == "spectrim":
        raise ModelError("the model is compressed already; start from the dense model, or dequantize it first")
    remedy = "start from the model in bfloat16, float16 or float32 that it was made of"
    if method is not None:
        raise ModelError(f"the model is already quantized (quant_method {method!r} in its config.json); {remedy}")
    if isinstance(model, PreTrainedModel):
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            packed = name.rpartition(".")[2] in _PACKED
            if packed or (name.endswith("weight") and not (parameter.is_floating_point() and parameter.itemsize > 1)):
                dtype = str(parameter.dtype).removeprefix("torch.")
                raise ModelError(f"the model is already quantized ({name} is {dtype}); {remedy}")


def quantization(config: PreTrainedConfig, *, unpacked: bool = True) -> str | None:
    """The ``quant_method`` of a model's files, as its config or that of a part names it; None for dense ones.

    With `unpacked` false, one that the config has unpacked while it is loaded counts as dense.
    """
    return _method(vars(config), unpacked)


def _method(entries: dict[str, Any], unpacked: bool) -> str | None:
    for key in _KEYS:
        if (config := entries.get(key)) is not None and (method := _name(config, unpacked)) is not None:
            return method
    for value in entries.values():
        inner = vars(value) if isinstance(value, PreTrainedConfig) else value
        if isinstance(inner, dict) and (method := _method(inner, unpacked)) is not None:
            return method
    return None


def _name(config: Any, unpacked: bool) -> str | None:
    """The method that one quantization config names."""
    entries = config if isinstance(config, dict) else vars(config)
    if entries.get("dequantize") is True and not unpacked:
        return None
    method = entries.get("quant_method")
    if method is None and (entries.get("load_in_4bit") or entries.get("load_in_8bit")):
        method = "bitsandbytes"  # of releases that did not write quant_method
    return str(getattr(method, "value", method) or "unknown")
