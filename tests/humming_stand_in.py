"""A stand-in for humming-kernels, which makes the CPU pass for a GPU."""

import json
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from spectrim.kernels import cuda
from spectrim.kernels.bits import unpack

GROUPED: list[int] = []  # numbers of weights of the grouped products


@dataclass(frozen=True)
class Config:
    """humming's description of a layer, as far as the stand-in needs it."""

    out: int
    size: int
    bits: int
    zeros: str | None
    groups: int
    num_experts: int = 0


class Schema:
    """humming's reader of compressed-tensors, which names the tensors anew."""

    def __init__(self, *, num_bits, strategy, group_size, symmetric, **rest):
        assert rest == {"format": "pack-quantized", "type": "int"}
        assert (strategy == "channel") == (group_size is None)
        self.bits, self.symmetric = num_bits, symmetric

    def convert_humming(self, tensors, out, size, dtype, device):
        assert ("weight_zero_point" in tensors) == (not self.symmetric)
        names = {"weight_packed": "weight", "weight_scale": "weight_scale", "weight_zero_point": "zero_point"}
        return self, {names[key]: tensor.clone() for key, tensor in tensors.items()}


def transform(tensors, out, size, schema, *, pad_n_to_multiple, pad_k_to_multiple, torch_dtype, device):
    """A layout that nobody can take for the packed words."""
    assert tensors["weight_scale"].dtype == torch_dtype
    config = Config(out, size, schema.bits, None if schema.symmetric else "zeros", tensors["weight_scale"].shape[1])
    return config, tensors | {"weight": tensors["weight"].T.contiguous()}


def forward(config, *, inputs, weight, weight_scale, zero_point, locks, expert_layout=None, compute_config=None):
    """The product as humming documents it: codes less zero points, or less the middle, times scales."""
    if expert_layout is not None:
        return grouped(config, inputs, weight, weight_scale, zero_point, locks, expert_layout, compute_config)
    assert config.num_experts == 0
    out, size, bits = config.out, config.size, config.bits
    assert locks.dtype == torch.int32
    codes = unpack(weight.T.contiguous(), bits, size).float().unflatten(1, (weight_scale.shape[1], -1))
    if zero_point is not None:
        codes = codes - unpack(zero_point.T, bits, out).T.float()[..., None]
    return (inputs.float() @ (codes * weight_scale.float()[..., None]).flatten(1).T).to(inputs.dtype)


def grouped(config, inputs, weight, weight_scale, zero_point, locks, starts, compute_config):
    """One weight after another on its rows, in the layout of experts that humming calls grouped and contiguous."""
    assert json.loads(compute_config) == {"gemm_type": "grouped_contiguous"}
    assert starts.dtype == torch.int32
    bounds = starts.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(inputs)
    assert len(bounds) - 1 == config.num_experts == len(weight) == len(weight_scale)
    one = replace(config, num_experts=0)
    parts = [
        forward(
            one,
            inputs=inputs[start:stop],
            weight=weight[number],
            weight_scale=weight_scale[number],
            zero_point=None if zero_point is None else zero_point[number],
            locks=locks,
        )
        for number, (start, stop) in enumerate(pairwise(bounds))
    ]
    GROUPED.append(config.num_experts)
    return torch.cat(parts)


@pytest.fixture
def gpu(monkeypatch):
    """The CPU passes for a GPU with humming."""
    parts = {
        "humming": {},
        "humming.schema": {"CompressedTensorsWeightSchema": Schema},
        "humming.transform": {"prepare_and_transform_humming_tensors": transform},
        "humming.forward": {"humming_forward": forward},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(cuda, "takes", lambda scale: scale.dtype in (torch.float16, torch.bfloat16))
    monkeypatch.setattr(cuda, "unpacked", lambda *_: None)
    cuda._SAID.clear()
    GROUPED.clear()
    return monkeypatch


@pytest.fixture
def grouped_products(gpu):
    """Numbers of weights of the grouped products so far."""
    return GROUPED
