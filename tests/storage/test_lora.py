"""LoRA on the factors of a compressed model: it trains, saves, loads and merges, whatever the form of the factors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressed import factored, logits, low_rank, pack_nearest
from families import FAMILIES, example_inputs
from spectrim.checkpoint import load, save
from spectrim.errors import ModelError
from spectrim.maths.rounding import Grid
from spectrim.storage.layers import LowRankLinear
from spectrim.storage.lora import lora_targets

peft = pytest.importorskip("peft")

FORMS = ("whole", "headwise", "pivoted")
RANK = 2


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=4, target_modules=lora_targets(model))
    return peft.get_peft_model(model, config)


def train(model: Any, steps: int = 8) -> list[float]:
    """Losses of a few steps on one batch."""
    inputs = example_inputs(model.base_model.model)
    labels = inputs["input_ids"].clone()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "llava"])
def test_lora_trains_saves_loads_and_merges(family: str, form: str, tmp_path: Path) -> None:
    small = load(save(factored(family, form=form), tmp_path / "small"))
    factors = {name: module.weight.clone() for name, module in small.named_modules() if type(module) is nn.Linear}
    ranks = {name: layer.rank for name, layer in low_rank(small).items()}
    before = logits(small)

    model = adapted(small)
    assert torch.equal(logits(small), before)  # a new adapter is zero
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(lora_targets(load(tmp_path / "small")))
    losses = train(model)
    assert losses[-1] < losses[0]
    after = logits(small)
    assert not torch.allclose(after, before, atol=1e-3)

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "small"), tmp_path / "adapter").eval()
    assert torch.equal(logits(again.base_model.model), after)

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), after, rtol=1e-4, atol=1e-4)
    assert {name: layer.rank for name, layer in low_rank(merged).items()} == ranks  # the same form and size
    plain = {name: module.weight for name, module in merged.named_modules() if type(module) is nn.Linear}
    assert plain.keys() == factors.keys()
    moved = {name for name in plain if not torch.equal(plain[name], factors[name])}
    unread = "vision_tower.encoder.layers.1."  # LLaVA reads its tower before the last block
    assert moved == {name for name in lora_targets(merged) if unread not in name}

    reopened = load(save(merged, tmp_path / "merged"))
    assert torch.equal(logits(reopened), logits(merged))
    assert {name: layer.rank for name, layer in low_rank(reopened).items()} == ranks
    torch.testing.assert_close(logits(reopened.dequantize()), after, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_the_targets_are_the_factors_and_nothing_else(form: str) -> None:
    small = factored("llava", form=form)
    owners = {name: module for name, module in small.named_modules() if isinstance(module, LowRankLinear)}
    targets = lora_targets(small)
    assert len(set(targets)) == len(targets)
    for name in targets:
        assert type(small.get_submodule(name)) is nn.Linear
        assert any(name.startswith(f"{owner}.") for owner in owners)
    inside = sum(p.numel() for name in targets for p in small.get_submodule(name).parameters())
    biases = sum(layer.bias.numel() for layer in owners.values() if layer.bias is not None)
    assert inside + biases == sum(p.numel() for layer in owners.values() for p in layer.parameters())


def test_a_dense_model_has_no_targets() -> None:
    with pytest.raises(ModelError, match="no factored layer"):
        lora_targets(FAMILIES["llama"]())


def test_an_unmerged_adapter_is_not_saved_as_factors() -> None:
    model = adapted(factored("llama"))
    train(model, steps=1)
    with pytest.raises(ModelError, match="merge its adapter"):
        next(iter(low_rank(model.base_model.model).values())).to_dense()


def packed_model(form: str) -> Any:
    """A compressed language model: all its linears integers ("dense"), all factors integers, or float and integer."""
    model = FAMILIES["llama"]() if form == "dense" else factored("llama")
    linears = [name for name, module in model.model.named_modules(prefix="model") if type(module) is nn.Linear]
    if form == "mixed":
        linears = [name for name in linears if name.endswith(".B")]
    if form == "some dense":
        model = FAMILIES["llama"]()
        linears = [name for name in linears if ".mlp." in name and name.endswith("A")]
        linears = [name.removesuffix(".A") for name in linears]
    pack_nearest(model, {name: Grid(4, None) for name in linears})
    return model


@pytest.mark.parametrize("form", ["dense", "integer factors"])
def test_integers_alone_cannot_be_adapted(form: str) -> None:
    model = packed_model(form)
    with pytest.raises(ModelError, match=r"all \d+ matrices are integers.*dequantize"):
        lora_targets(model)


def test_what_is_float_beside_integers_is_adapted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "spectrim"):
        mixed = lora_targets(packed_model("mixed"))
    assert mixed == [f"{name}.A" for name in low_rank(packed_model("mixed"))]
    assert "leaves out 14 matrices of integers" in caplog.text
    model = load(save(packed_model("some dense"), tmp_path / "a"))
    assert {name.split(".")[-2] for name in lora_targets(model)} == {"self_attn"}
    before = logits(model)
    assert train(adapted(model))[-1] < train(adapted(load(tmp_path / "a")), 1)[0]
    assert not torch.equal(logits(model), before)
