"""Fused experts as linears of their own, and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from compressed import config_of, logits
from families import FAMILIES, FURTHER, text_inputs
from spectrim.anatomy import anatomy
from spectrim.checkpoint import load, save
from spectrim.checkpoint.quantizer import attach
from spectrim.experts import all_tokens, fuse, unfuse, unfused
from spectrim.storage import exchange, stored_layers

MIXTURES = ("mixtral", "qwen3_moe", "qwen3_vl_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4v_moe")
MIXTURES += ("llama4", "gemma4_moe", "qwen3_5_moe")
BUILD: dict[str, Callable[[], Any]] = {name: (FAMILIES | FURTHER)[name] for name in MIXTURES}


def mixtures(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if unfused(module)]


@pytest.mark.parametrize("family", BUILD)
def test_experts_as_linears_compute_the_same_and_become_what_they_were(family: str) -> None:
    model = BUILD[family]().double()
    model.set_experts_implementation("eager")
    expected, before = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unfuse(model)
    assert all(len(dict(module.named_children())) >= 4 for module in mixtures(model))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    with all_tokens():
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    fuse(model)
    assert not mixtures(model)
    assert torch.equal(logits(model), expected)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_weights_are_views_of_the_fused_ones() -> None:
    model = BUILD["qwen3_moe"]()
    experts = model.model.layers[0].mlp.experts
    places = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    unfuse(model)
    assert {p.untyped_storage().data_ptr() for p in experts.parameters()} == places


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradients_flow_as_through_fused_experts(family: str) -> None:
    model = BUILD[family]().double()
    model.set_experts_implementation("eager")
    gradients = []
    for change in (lambda _: None, unfuse):
        change(model)
        embedding = model.get_input_embeddings().weight
        embedding.grad = None
        model(**text_inputs(model)).logits.square().sum().backward()
        gradients.append(embedding.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gemma4_moe"])
def test_a_token_alone_is_what_it_is_among_others(family: str) -> None:
    """Numbers from that of experts on stand for none."""
    model = BUILD[family]().double()
    unfuse(model)
    experts = next(iter(mixtures(model)))
    x, weights = torch.randn(3, 64, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    indices = torch.tensor([[3, 1], [2, 4], [0, 2]])
    together = experts(x, indices, weights)
    for token in range(3):
        alone = experts(x[token : token + 1], indices[token : token + 1], weights[token : token + 1])
        torch.testing.assert_close(alone, together[token : token + 1], rtol=0, atol=1e-12)


def test_only_chosen_experts_run_unless_all_are_asked_for() -> None:
    model = BUILD["mixtral"]()
    unfuse(model)
    experts, seen = model.model.layers[0].mlp.experts, dict[int, int]()
    for number in range(4):
        hook = lambda _, args, number=number: seen.__setitem__(number, len(args[0]))  # noqa: E731
        experts.get_submodule(f"{number}.w1").register_forward_pre_hook(hook)
    x, weights = torch.randn(3, 64), torch.full((3, 2), 0.5)
    experts(x, torch.tensor([[0, 2], [2, 3], [0, 2]]), weights)
    assert seen == {0: 2, 2: 3, 3: 1}
    seen.clear()
    with all_tokens():
        experts(x, torch.tensor([[0, 2], [2, 3], [0, 2]]), weights)
    assert seen == dict.fromkeys(range(4), 3)


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_every_expert_reads_every_token_if_asked(family: str) -> None:
    """Also where each has a block of its own, with zeros for the tokens of others."""
    model = BUILD[family]().double()
    unfuse(model)
    layer = next(iter(mixtures(model)))
    seen: dict[int, torch.Tensor] = {}
    for number in range(4):
        hook = lambda _, args, number=number: seen.__setitem__(number, args[0].detach())  # noqa: E731
        next(layer.get_submodule(f"{number}").children()).register_forward_pre_hook(hook)
    with all_tokens():
        logits(model)
    assert seen[0].any(-1).all()
    assert all(torch.equal(x, seen[0]) for x in seen.values())


@pytest.mark.parametrize("family", BUILD)
def test_a_checkpoint_names_experts_one_by_one_and_loads(family: str, tmp_path: Path) -> None:
    """Some experts in integers, some in factors, some dense."""
    model = BUILD[family]()
    kinds = {
        "gate": ("low-rank", {"rank": 8, "pivoted": False}),
        "up": ("integers", {"bits": 4, "group": 8, "symmetric": True}),
    }
    chosen = {x.name: kinds[x.role] for x in anatomy(model).linears if x.expert is not None and x.role in kinds}
    exchange(model, chosen)
    for layer in stored_layers(model).values():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                torch.nn.init.constant_(tensor, 0.01)
            elif name == "weight_packed":
                tensor.random_(generator=torch.Generator().manual_seed(0))
    attach(model)
    expected = logits(model)
    save(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    first = "w1" if family == "mixtral" else "gate_proj"
    gate = next(name for name in stored if name.endswith(f".experts.3.{first}.A.weight")).removesuffix(".A.weight")
    up, down = (gate.replace("gate_proj", f"{x}_proj").replace("w1", w) for x, w in (("up", "w3"), ("down", "w2")))
    assert stored[f"{gate}.A.weight"].shape[1] == stored[f"{gate}.B.weight"].shape[0] == 8
    assert stored[f"{up}.weight_packed"].dtype == torch.int32
    assert stored[f"{down}.weight"].numel() > 0
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in stored)
    assert gate in config_of(tmp_path / "a")["quantization_config"]["ranks"]
    auto = AutoModelForImageTextToText if hasattr(model.config, "vision_config") else AutoModelForCausalLM
    again, report = auto.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(
        again.generate(**text_inputs(again), max_new_tokens=3)[0, :12], text_inputs(again)["input_ids"][0]
    )
    # Dense again, with experts fused, it is a model of transformers like any other.
    plain = again.dequantize()
    assert not mixtures(plain)
    before = logits(plain)
    torch.testing.assert_close(before, expected, rtol=1e-3, atol=1e-4)
    plain.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(logits(load(tmp_path / "b")), before)
