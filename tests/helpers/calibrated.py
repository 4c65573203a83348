"""Few-layer models, what their linears read, and statistics directories read without the library's reader."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import families
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics
from spectrim.calibrate.manifest import MANIFEST
from spectrim.disk.lock import LOCK


def tiny(family: str, dtype: torch.dtype = torch.float64):
    return families.FAMILIES[family]().to(dtype)


def record_inputs(model, inputs) -> dict[str, list[np.ndarray]]:
    """What every linear reads in one plain forward pass, float64 ``[positions, in]`` per call."""
    seen, handles = defaultdict(list), []
    for linear in anatomy(model).linears:

        def keep(_module, args, name=linear.name):
            seen[name].append(args[0].detach().double().reshape(-1, args[0].shape[-1]).numpy())

        handles.append(model.get_submodule(linear.name).register_forward_pre_hook(keep))
    dtype = model.dtype
    with torch.no_grad():
        model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}, use_cache=False)
    for handle in handles:
        handle.remove()
    return dict(seen)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor that the manifest names."""
    manifest = json.loads((directory / MANIFEST).read_text())
    held = {}
    for modality, gathered in manifest["gathered"].items():
        for file in gathered["files"].values():
            held |= {f"{modality} {name}": t for name, t in load_file(directory / file["name"]).items()}
    return held


def named(directory: Path) -> set[str]:
    """What a finished directory holds: the manifest, the files that it names, and the lock."""
    gathered = Statistics.open(directory).manifest.gathered.values()
    return {file.name for part in gathered for file in part.files.values()} | {MANIFEST, LOCK}


def assert_same_bits(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert left
    assert all(torch.equal(left[name], right[name]) for name in left)
