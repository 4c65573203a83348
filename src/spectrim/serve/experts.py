"""Experts of a mixture in vLLM, whose kernels want those of a layer in one form: they are unpacked when they arrive.

vLLM keeps the experts of a layer fused: ``w13_weight`` has gate and up, ``w2_weight`` down. Its loaders name tensors
of single experts after these: ``experts.7.w1.A.weight`` becomes ``w13_A.weight`` of expert 7 and shard ``w1``. So there
is a slot for every name that an expert may bring; with the last tensor of a linear, its weight goes the way of a dense
one, by vLLM's own loader, which shares it among processes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from spectrim.checkpoint.names import shortened
from spectrim.errors import CheckpointError, ModelError
from spectrim.serve.served import Served, check_shape
from spectrim.storage import form
from spectrim.storage.base import StoredLayer, empty_linear, tensors_of

_WHOLE = {"w1": "w13", "w3": "w13", "w2": "w2"}  # the fused weight that a shard is part of


def add_slot(module: nn.Module, name: str, dtype: torch.dtype, load: Callable[..., Any]) -> None:
    """An empty parameter `name` (dots stand for modules below) that a loader of vLLM finds, and hands to `load`."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    parameter.weight_loader = load  # type: ignore[attr-defined]
    module.register_parameter(last, parameter)


class ExpertsMethod(UnquantizedFusedMoEMethod):
    """vLLM's own method for experts in floats, with slots for the tensors of those that are stored in any form.

    Raises CheckpointError for experts that vLLM loads in a way of the model.
    """

    def __init__(self, layer: Any, prefix: str, served: Served) -> None:
        if type(layer).weight_loader is not RoutedExperts.weight_loader:
            raise CheckpointError(
                f"vLLM loads the experts {prefix!r} in a way of their own ({type(layer).__name__}); keep experts "
                "dense, or serve the dequantized model (model.dequantize() and save_pretrained)"
            )
        super().__init__(layer.moe_config)
        self.prefix, self.served = prefix, served
        self.held: dict[str, StoredLayer] = {}  # linears of which some tensors have arrived
        self.missing: dict[str, set[str]] = {}  # tensors by linear
        self._load_dense: Callable[..., Any] | None = None

    @property
    def supports_eplb(self) -> bool:
        """Experts do not move between processes."""
        return False

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The fused weights in floats, and the slots that the loader fills."""
        self._load_dense = extra_weight_attrs["weight_loader"]
        extra = {**extra_weight_attrs, "weight_loader": self._guard}
        super().create_weights(layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra)
        slots: dict[str, torch.dtype] = {}
        shares = self.moe.moe_parallel_config.tp_size
        for expert in range(self.moe.num_logical_experts):
            for shard, whole in _WHOLE.items():
                name = self._name(layer, expert, shard)
                if name not in self.served.layers:
                    continue
                out, inputs = self._shape(shard)
                kind, spec = self.served.layers[name]
                try:
                    tensors = tensors_of(kind, inputs, out, spec, params_dtype)
                except ModelError as error:
                    raise CheckpointError(f"{name!r}: {error}; copy the checkpoint's config.json again") from error
                slots |= {f"{whole}_{part}": tensor.dtype for part, tensor in tensors.items()}
                if not _is_here(layer, expert):
                    continue  # the loader asks for its slots, too
                self.missing[name] = {*tensors}
                stored = sum(tensor.nbytes for tensor in tensors.values())
                self.served.experts[self.prefix] += (out * inputs * params_dtype.itemsize - stored) // shares
        for name, dtype in slots.items():
            add_slot(layer, name, dtype, partial(self._load, layer, name.partition("_")[2]))
            if "." in name:  # RoutedExperts asks by getattr, loaders of models ask named_parameters
                vars(layer)[name] = layer.get_parameter(name)

    def _name(self, layer: Any, expert: int, shard: str) -> str:
        """vLLM's name of a linear."""
        names = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}
        return f"{self.prefix}.{expert}.{names[shard]}"

    def _shape(self, shard: str) -> tuple[int, int]:
        """Size [out, in] of a linear of all processes, without what kernels pad."""
        inner, hidden = self.moe.intermediate_size, self.moe.hidden_dim_unpadded
        return (hidden, inner) if shard == "w2" else (inner, hidden)

    def _guard(
        self,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Load a dense weight; the empty one beside other forms stops loaders that know none, and is left out."""
        if loaded_weight.numel():
            assert self._load_dense is not None
            found: bool | None = self._load_dense(
                param, loaded_weight, weight_name, shard_id, expert_id, return_success
            )
            return found
        return True if return_success else None

    def _load(
        self,
        layer: Any,
        part: str,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Keep a tensor of a linear; with the last one, load the weight that it stands for."""
        if not _is_here(layer, expert_id):
            return False if return_success else None
        name = self._name(layer, expert_id, shard_id)
        if part not in self.missing.get(name, ()):
            raise CheckpointError(
                f"the checkpoint holds {name}.{part}, of which config.json does not know; copy it again"
            )
        if name not in self.held:
            out, inputs = self._shape(shard_id)
            kind, spec = self.served.layers[name]
            # Products in float32: one rounding, as of a dense weight.
            built: Any = form(kind).build(empty_linear(inputs, out, torch.float32), spec)
            self.held[name] = built.to_empty(device=param.device)
        held = self.held[name]
        place = held.state_dict()[part]
        check_shape(f"{name}.{part}", loaded_weight, place.shape)
        place.copy_(loaded_weight)
        self.missing[name].discard(part)
        if self.missing[name]:
            return True if return_success else None
        del self.held[name]
        try:
            held.loaded()
        except ModelError as error:
            raise CheckpointError(f"{name}.{error}; copy or compress the checkpoint again") from error
        whole = f"{_WHOLE[shard_id]}_weight"
        with torch.no_grad():
            W = held.product()
        return self._guard(layer.get_parameter(whole), W, whole, shard_id, expert_id, return_success)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the slots away. Raises CheckpointError if a tensor never arrived."""
        self.served.report()
        if missing := sorted(f"{name}.{part}" for name, parts in self.missing.items() for part in parts):
            raise CheckpointError(f"the checkpoint lacks {shortened(missing)}; copy or compress it again")
        own = {f"{whole}_{kind}" for whole in ("w13", "w2") for kind in ("weight", "bias")}
        for name in [name for name in (*layer._parameters, *layer._modules) if name.startswith(("w13_", "w2_"))]:
            if name not in own:
                delattr(layer, name)
        for name in [name for name in vars(layer) if name.startswith(("w13_", "w2_")) and "." in name]:
            del vars(layer)[name]
        super().process_weights_after_loading(layer)


def _is_here(layer: Any, expert: int) -> bool:
    """Whether this process has the expert."""
    return bool(layer.expert_map_manager.map_global_to_local(expert) >= 0)
