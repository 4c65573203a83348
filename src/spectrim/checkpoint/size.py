"""How many bytes a model takes as safetensors, before it is written."""

import json
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

Stored = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""

_SHARD = 10**9  # bytes: `save` begins a new file where one would get larger, or later
_NAME = 24  # bytes by which a name in the file may be longer than at run time


def saved_tensors(model: PreTrainedModel) -> dict[str, Stored]:
    """The tensors that ``save_pretrained`` writes, by run-time name where it is the same tensor; tied ones once.

    Tensors that are stored in parts, as fused experts are, have the names of the file.
    """
    seen: set[tuple[int, torch.Size]] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = (id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape)  # tied meta tensors are one object
        if tensor.numel() == 0 or place not in seen:
            seen.add(place)
            state[name] = torch.empty_like(tensor, device="meta")
    files = revert_weight_conversion(model, dict(state))
    mine, theirs = ({id(tensor) for tensor in named.values()} for named in (state, files))
    found = {name: tensor for name, tensor in state.items() if id(tensor) in theirs}
    found |= {name: tensor for name, tensor in files.items() if id(tensor) not in mine}
    return {name: (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}


def file_bytes(tensors: Iterable[Stored]) -> int:
    """Bytes of the safetensors files of these tensors, headers included; at most a few bytes a tensor too many."""
    tensors = list(tensors)
    data = sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in tensors)
    header = sum(
        len(json.dumps(name)) + _NAME + len(str(list(shape))) + 2 * len(str(data)) for name, _, shape in tensors
    )
    fixed = len('":{"dtype":"F8_E4M3","shape":,"data_offsets":[,]},') * len(tensors)
    return data + header + fixed + 256 * (1 + data // _SHARD)
