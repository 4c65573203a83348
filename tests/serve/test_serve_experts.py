"""vLLM's fused experts, in one and several processes, from experts in stored forms. Needs vLLM."""

import json
import logging
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.platforms.interface import DeviceCapability

    from helpers.vllm_layers import config, part, rounded

from safetensors.torch import load_file

from compressed import pack_nearest
from served import mixture
from spectrim import save
from spectrim.anatomy import anatomy
from spectrim.errors import CheckpointError
from spectrim.maths.rounding import Grid
from spectrim.storage import StoredLayer

pytestmark = pytest.mark.filterwarnings("ignore")
GPU = SimpleNamespace(
    is_cuda=lambda: True, is_cuda_alike=lambda: True, is_cpu=lambda: False, is_rocm=lambda: False, is_xpu=lambda: False,
    device_name="cuda", get_device_capability=lambda *_: DeviceCapability(9, 0), has_device_capability=lambda _: True,
    is_device_capability=lambda c: c == 90, is_device_capability_family=lambda c: c == 90,
)  # fmt: skip
EXPERTS, HIDDEN, INNER = 4, 64, 96
ROLES = {"w1": ("gate_proj", INNER, HIDDEN), "w3": ("up_proj", INNER, HIDDEN), "w2": ("down_proj", HIDDEN, INNER)}


def experts() -> dict[str, Any]:
    """All linears of four experts: dense, integers, factors of floats and integers, pivoted, with a rest."""
    torch.manual_seed(0)
    made = {}
    for expert in range(EXPERTS):
        for number, (name, out, inputs) in enumerate(ROLES.values()):
            kind = (3 * expert + number) % 6
            rank = (None, None, 9, 32, 7, 32)[kind]
            layer: Any = part(out, rank, kind == 4, inputs)
            layer.bias = None
            integers = ((), ("",), (), ("A", "B"), (), ("R",))[kind]
            if integers:
                layer = rounded(layer, integers, (3, 4, 8, 2)[expert], expert % 2 == 0, 32)
            made[f"x.experts.{expert}.{name}"] = layer
    return made


def fused(
    quantization: Any,
    *,
    size: tuple[int, int] = (HIDDEN, INNER),
    prefix: str = "x.experts",
    dtype: torch.dtype = torch.float32,
    tensor: tuple[int, int] = (0, 1),
    expert: tuple[int, int] = (0, 1),
) -> Any:
    """vLLM's module, in a process with this rank and size, for tensors and for experts; nothing is loaded."""
    hidden, inner = size
    parallel = FusedMoEParallelConfig.make_no_parallel()
    parallel.tp_rank, parallel.tp_size = tensor
    parallel.ep_rank, parallel.ep_size = expert
    parallel.use_ep = expert[1] > 1
    manager = ExpertMapManager(
        max_num_batched_tokens=8, top_k=2, global_num_experts=EXPERTS, num_redundant_experts=0, num_expert_group=None,
        moe_parallel_config=parallel, placement_strategy="linear", enable_eplb=False,
    )  # fmt: skip
    settings = FusedMoEConfig(
        num_experts=EXPERTS, experts_per_token=2, hidden_dim=hidden, intermediate_size=inner,
        num_local_experts=manager.local_num_experts, num_logical_experts=EXPERTS, activation=MoEActivation.SILU,
        device="cpu", routing_method=RoutingMethodType.Renormalize, moe_parallel_config=parallel,
        in_dtype=dtype,
    )  # fmt: skip
    return RoutedExperts(prefix, dtype, settings, quantization, manager)


def load(layer: Any, made: dict[str, Any], left_out: str = "") -> None:
    """Load the tensors of all experts, and the guards beside compressed ones, as vLLM's loader does."""
    for name, source in made.items():
        tensors = dict(source.state_dict())
        if isinstance(source, StoredLayer):
            tensors["weight"] = torch.empty(0)
        found = ((f"{name}.{key}".removeprefix("x.experts."), tensor.clone()) for key, tensor in tensors.items())
        list(layer.load_weights((key, tensor) for key, tensor in found if key != left_out))


def dense(made: dict[str, Any], expert: int, shard: str) -> torch.Tensor:
    source = made[f"x.experts.{expert}.{ROLES[shard][0]}"]
    return source.product().detach() if isinstance(source, StoredLayer) else source.weight.detach()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("by", ["tensor", "expert"])
def test_experts_arrive_as_the_weights_that_they_stand_for(by, size, process):
    """Each process has its part of every expert, or its experts whole."""
    process(0, 1)
    made, seen = experts(), 0
    for rank in range(size):
        layer = fused(config(made), **{by: (rank, size)})
        load(layer, made)
        for expert in range(EXPERTS):
            local = layer.expert_map_manager.map_global_to_local(expert)
            if local < 0:
                continue
            seen += 1
            parts = (rank, size) if by == "tensor" else (0, 1)
            gate, up = (dense(made, expert, shard).chunk(parts[1])[parts[0]] for shard in ("w1", "w3"))
            torch.testing.assert_close(layer.w13_weight[local].data, torch.cat([gate, up]))
            down = dense(made, expert, "w2").chunk(parts[1], dim=1)[parts[0]]
            torch.testing.assert_close(layer.w2_weight[local].data, down)
    assert seen == (EXPERTS * size if by == "tensor" else EXPERTS)


def test_they_run_in_vllm_s_kernel(process, caplog):
    process(0, 1)
    made = experts()
    layer = fused(config(made))
    load(layer, made)
    with caplog.at_level(logging.WARNING, logger="spectrim"):
        layer.quant_method.process_weights_after_loading(layer)
    stored = [x for x in made.values() if isinstance(x, StoredLayer)]
    cost = sum(4 * x.in_features * x.out_features - sum(t.nbytes for t in x.tensors().values()) for x in stored)
    assert (
        f"experts of 1 layers are unpacked into floats for vLLM's fused kernels, which takes {cost / 1e6:.1f} MB"
        in (caplog.text)
    )
    assert {name for name, _ in layer.named_parameters()} == {"w13_weight", "w2_weight"}
    x = torch.randn(5, HIDDEN)
    ids = torch.tensor([[0, 1], [2, 3], [1, 3], [3, 0], [2, 1]], dtype=torch.int32)
    weights = torch.rand(5, 2)
    got = layer.quant_method.apply(layer, x, weights, ids, None, None)
    for row in range(5):
        wanted = torch.zeros(HIDDEN)
        for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
            gate, up, down = (dense(made, expert, shard) for shard in ("w1", "w3", "w2"))
            wanted += weight * (down @ (torch.nn.functional.silu(gate @ x[row]) * (up @ x[row])))
        torch.testing.assert_close(got[row], wanted, rtol=1e-4, atol=1e-3)


def test_a_tensor_that_is_missing_misshapen_or_unknown_is_an_error(process):
    process(0, 1)
    made = experts()
    layer = fused(config(made))
    load(layer, made, left_out="1.up_proj.pivots")
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks x\.experts\.1\.up_proj\.pivots"):
        layer.quant_method.process_weights_after_loading(layer)
    layer = fused(config(made))
    with pytest.raises(CheckpointError, match=r"x\.experts\.0\.down_proj\.A\.weight has the shape \[9, 9\] instead"):
        list(layer.load_weights([("0.down_proj.A.weight", torch.zeros(9, 9))]))
    with pytest.raises(CheckpointError, match=r"holds x\.experts\.0\.gate_proj\.B\.weight, of which config\.json"):
        list(layer.load_weights([("0.gate_proj.B.weight", torch.zeros(9, 9))]))


def test_experts_that_a_model_loads_in_its_own_way_are_refused(process):
    class Own(RoutedExperts):
        def weight_loader(self, *args: Any) -> None: ...

    process(0, 1)
    made = experts()
    layer = fused(config(made))
    with pytest.raises(CheckpointError, match=r"vLLM loads the experts 'x\.experts' in a way of their own \(Own\)"):
        Own("x.experts", torch.float32, layer.moe_config, config(made), layer.expert_map_manager)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, 64)])
def test_plain_experts_are_what_vllm_s_own_kernels_for_gpus_read(bits, group, process, monkeypatch, tmp_path):
    """Names, shapes and words, as they stand in vLLM's module before its kernel lays them out anew."""
    process(0, 1)
    model = mixture("qwen3_moe", "dense").to(torch.bfloat16)
    pack_nearest(model, {linear.name: Grid(bits, group) for linear in anatomy(model).linears})
    save(model, tmp_path / "a", format="compressed-tensors")
    described = json.loads((tmp_path / "a" / "config.json").read_text())
    quantization = CompressedTensorsConfig.from_config(described["quantization_config"])
    prefix = "model.layers.0.mlp.experts"
    sizes: dict[str, Any] = {"size": (described["hidden_size"], described["moe_intermediate_size"])}
    sizes |= {"prefix": prefix, "dtype": torch.bfloat16}
    with pytest.raises(NotImplementedError, match="No WNA16 MoE backend supports the deployment configuration"):
        fused(quantization, **sizes)  # of this CPU, without AMX
    for module in (int_wna16, marlin_moe, marlin_utils):
        monkeypatch.setattr(module, "current_platform", GPU)
    layer = fused(quantization, **sizes)
    assert layer.quant_method.wna16_backend.value == "MARLIN"
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    mine = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    loaded = list(layer.load_weights(mine.items()))
    assert {*loaded} == {name for name, _ in layer.named_parameters()}
    for expert in range(EXPERTS):
        parts = [model.get_submodule(f"{prefix}.{expert}.{name}_proj") for name in ("gate", "up", "down")]
        for kind in ("weight_packed", "weight_scale"):
            gate, up, down = (part.state_dict()[kind] for part in parts)
            assert torch.equal(getattr(layer, f"w13_{kind}")[expert], torch.cat([gate, up]))
            assert torch.equal(getattr(layer, f"w2_{kind}")[expert], down)
