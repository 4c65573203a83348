"""Model fingerprints: equal for equal weights wherever and however they were loaded, and cheap to take."""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.away import values
from spectrim.calibrate.manifest import ModelPrint
from spectrim.errors import ModelError

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24  # elements summed at once: bounds the memory of the int64 copy
_STRIDED = 256  # elements sampled evenly from each tensor

# Config entries that say how a model was loaded or is run, not which one it is.
_PASSING = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def model_print(model: PreTrainedModel) -> ModelPrint:
    """Fingerprint of a model's config and of every parameter's shape, dtype and content.

    The digest of a parameter covers the sum of its elements' bit patterns as integers, which is exact in any order and
    on any device, and 256 elements spread over the tensor, which catch a change of order.

    Raises:
        ModelError: a parameter is not in memory, or was made under ``torch.inference_mode()``.
    """
    config = json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str)
    tensors = {}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        there = parameter.is_meta and hasattr(module, "_hf_hook")  # on disk
        tensors[name] = _tensor_print(name, values(module, last) if there else parameter)
    return ModelPrint(config=hashlib.sha256(config.encode()).hexdigest(), tensors=tensors)


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        items = ((str(key), item) for key, item in value.items())
        return {key: _lasting(item) for key, item in items if key not in _PASSING and not key.startswith("_")}
    return [_lasting(item) for item in value] if isinstance(value, list | tuple) else value


def _tensor_print(name: str, tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        raise ModelError(f"parameter {name} is not in memory; load the model without offloading")
    if tensor.is_inference():
        raise ModelError(
            f"parameter {name} was made under torch.inference_mode(), so that nothing can be differentiated; load the "
            "model outside of it"
        )
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.dtype.itemsize])
    total = sum(int(chunk.sum(dtype=torch.int64)) for chunk in bits.split(_CHUNK))
    sampled = bits[:: max(1, len(bits) // _STRIDED)].cpu().numpy().tobytes()
    digest = hashlib.sha256(total.to_bytes(16, "little", signed=True) + sampled).hexdigest()[:16]
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}:{digest}"
