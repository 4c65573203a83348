"""The two names of a linear: the one it has at run time, and the one its tensors have in a checkpoint.

transformers 5 renames modules between both (``model.language_model.layers.0…`` at run time is ``model.layers.0…`` in a
Qwen2.5-VL file). Both directions here run the renaming that transformers itself runs on saving and on loading.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from spectrim.errors import CheckpointError
from spectrim.experts import loads_as_is
from spectrim.storage import DENSE, StoredLayer, forms
from spectrim.storage import stored_layers as layers_in

_PLACE = ".B.weight"  # a tensor that no dense model has: what happens to its name happens to all tensors of a linear

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def checkpoint_names(model: PreTrainedModel, keys: Iterable[str] | None = None) -> dict[str, str]:
    """Run-time name → checkpoint name, without ``.weight``, of every linear that may be stored in another form.

    Covers dense linears and stored layers. Left out are linears that the model's checkpoint format stores merged with
    other tensors, so that tensors of another form have no place in it. `keys` are the names of the model's tensors,
    where they are not in the model itself (as with FSDP, which flattens them).
    """
    linears = _linears(model)
    saved = saved_names(model, {*(tensor_names(model) if keys is None else keys), *(name + _PLACE for name in linears)})
    return {
        name: saved[name + _PLACE].removesuffix(_PLACE)
        for name in linears
        if saved.get(name + _PLACE, "").endswith(_PLACE)
    }


def compressed_layers(model: nn.Module) -> dict[str, StoredLayer]:
    """Every layer of `model` in a stored form, by runtime name without the wrappers around modules."""
    return {_unwrapped(name): layer for name, layer in layers_in(model).items()}


def tensor_names(model: nn.Module) -> set[str]:
    """The keys of ``model.state_dict()``, without asking for tensors that other processes may have to send."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        passing = module._non_persistent_buffers_set
        names |= {f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False) if name not in passing}
    return {_unwrapped(name.removeprefix(".")) for name in names}


def stored_layers(model: PreTrainedModel, keys: Collection[str] | None = None) -> dict[str, StoredLayer]:
    """Every compressed layer of `model` by its checkpoint name; `keys` as for `checkpoint_names`.

    Raises CheckpointError for a layer that has no name in the checkpoint format or whose name does not lead back to it.
    """
    layers = compressed_layers(model)
    keys = tensor_names(model) if keys is None else keys
    names = checkpoint_names(model, keys)
    if unnamed := sorted(layers.keys() - names.keys()):
        raise CheckpointError(
            f"the checkpoint format of {type(model).__name__} has no place for factors of {shortened(unnamed)}; keep "
            "these layers dense"
        )
    stored = {names[name]: layer for name, layer in layers.items()}
    back = runtime_names(model, stored, saved_names(model, keys).values())
    if lost := sorted(name for name in layers if back[names[name]] != name):
        raise CheckpointError(
            f"the factors of {shortened(lost)} would load into another layer of {type(model).__name__}; keep these "
            "layers dense"
        )
    return stored


def runtime_names(model: PreTrainedModel, names: Iterable[str], tensors: Iterable[str] | None = None) -> dict[str, str]:
    """Checkpoint name → run-time name of the linears called `names`; the inverse of `checkpoint_names`.

    `tensors` are the names of all tensors of the checkpoint: some renamings of transformers depend on which other
    tensors there are. Raises CheckpointError for a name of which the marker of no form is among them, or that maps to
    no linear of `model`.
    """
    linears = _linears(model)
    held = None if tensors is None else set(tensors)
    suffixes = [f".{form.marker}" for form in forms() if form.name != DENSE]
    wanted = {
        f"{name}{next((end for end in suffixes if held is not None and name + end in held), suffixes[0])}": name
        for name in names
    }
    keys = wanted.keys() if held is None else held
    if missing := sorted(wanted.keys() - keys):
        raise CheckpointError(f"the checkpoint lacks the tensor {shortened(missing)}; copy or compress it again")
    known: dict[str, Any] = dict.fromkeys(tensor_names(model), True)
    known |= {f"{name}{end}": True for name in linears for end in suffixes}
    renamings, converters = _split(loads_as_is(get_model_conversion_mapping(model), model))
    found = {}
    for key in sorted(keys, key=dot_natural_key):
        prefix = model.base_model_prefix
        renamed, converter = rename_source_key(key, renamings, converters, prefix, known)
        if renamed not in known and key in known:
            renamed, converter = rename_source_key(key, [], [], prefix, known)
        if key in wanted:
            name = renamed.removesuffix(key.removeprefix(wanted[key]))
            if converter is not None or name not in linears:
                raise CheckpointError(
                    f"the checkpoint's linear {wanted[key]!r} maps to no linear of {type(model).__name__}; load it "
                    "with the model class that it was saved from"
                )
            found[wanted[key]] = name
    return found


def saved_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Run-time name → checkpoint name of the tensors that ``save_pretrained`` only renames: not merged, not split.

    It applies the transforms that the model was loaded with, reversed.
    """
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:  # not loaded from a file: prefixes stay as they are, as in transformers
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [transform for transform in mapping if not isinstance(transform, PrefixChange)]
    renamings, converters = _split(transform.reverse_transform() for transform in reversed(transforms))
    saved = {}
    for key in sorted(keys, key=dot_natural_key):  # some renamings depend on the keys before
        renamed, converter = rename_source_key(key, renamings, converters, reverse=True)
        if converter is None:
            saved[key] = renamed
    return saved


def shortened(names: Sequence[str]) -> str:
    """Up to five names, and how many more there are."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Dense linears, embeddings and stored layers by run-time name, without the linears inside stored layers."""
    layers: dict[str, nn.Module] = dict(layers_in(model))
    inside = tuple(f"{name}." for name in layers)
    kinds = nn.Linear | nn.Embedding
    dense = {name: x for name, x in model.named_modules() if isinstance(x, kinds) and not name.startswith(inside)}
    return {_unwrapped(name): module for name, module in (layers | dense).items()}


def _unwrapped(name: str) -> str:
    """The name without the modules that FSDP, activation checkpointing and ``torch.compile`` put around others."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _split(transforms: Iterable[Any]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    transforms = list(transforms)
    return (
        [transform for transform in transforms if isinstance(transform, WeightRenaming)],
        [transform for transform in transforms if isinstance(transform, WeightConverter)],
    )
