"""Compressed models that accelerate dispatches, with parts of them on disk."""

from pathlib import Path

import pytest
import torch

from compressed import factored, logits, packed
from spectrim.checkpoint import load, save
from spectrim.checkpoint.names import compressed_layers
from spectrim.errors import CheckpointError, ModelError
from spectrim.storage import StoredLayer
from spectrim.storage.lora import lora_targets


def places(family: str) -> dict[str, str]:
    """A device for every module without blocks; the last block is on disk."""
    base = "model" if family == "llama" else "model.language_model"
    found = {f"{base}.{name}": "cpu" for name in ("embed_tokens", "layers.0", "norm", "rotary_emb")}
    found |= {f"{base}.layers.1": "disk", "lm_head": "cpu"}
    return found if family == "llama" else {**found, "model.visual": "cpu"}


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize("form", ["whole", "headwise", "pivoted", "packed"])
@pytest.mark.parametrize("buffers", [False, True])
def test_every_form_runs_from_disk_and_is_saved(family: str, form: str, buffers: bool, tmp_path: Path) -> None:
    model = packed(family) if form == "packed" else factored(family, form=form)
    directory, expected = save(model, tmp_path / "a"), logits(model)
    where = {"device_map": places(family), "offload_folder": tmp_path / "o", "offload_buffers": buffers}
    if form == "pivoted" and buffers:  # the order of outputs follows from values that are not there
        with pytest.raises(CheckpointError, match="without offloading its buffers"):
            load(directory, **where)
        return
    away = load(directory, **where)
    assert any(parameter.is_meta for parameter in away.parameters())
    assert torch.equal(logits(away), expected)
    assert lora_targets(away) == lora_targets(model)
    for layer in away.modules():
        if isinstance(layer, StoredLayer):
            layer.loaded()
    with pytest.raises(ModelError, match="without offloading"):
        away.dequantize()
    assert compressed_layers(away).keys() == compressed_layers(model).keys()
    with pytest.warns(UserWarning, match="offloaded modules"):
        save(away, tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b")), expected)


@pytest.mark.parametrize("form", ["whole", "headwise", "pivoted", "packed"])
def test_a_model_dispatched_to_one_device_is_merged(form: str, tmp_path: Path) -> None:
    model = packed("llama") if form == "packed" else factored("llama", form=form)
    directory, expected = save(model, tmp_path / "a"), logits(model)
    again = load(directory, device_map={"": "cpu"})
    assert torch.equal(logits(again), expected)
    torch.testing.assert_close(logits(again.dequantize()), expected, rtol=1e-3, atol=1e-3)
