"""A checkpoint is compared with the model in memory before it takes its place."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn

from compressed import factored
from families import FAMILIES, FURTHER, TEXT, example_inputs, text_inputs
from spectrim import compress
from spectrim.checkpoint import save
from spectrim.checkpoint.check import check_written, runnable
from spectrim.errors import CheckpointError
from spectrim.storage.layers import LowRankLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_what_was_written_is_the_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = factored(family).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in example_inputs(model).items()}
    model.train()
    save(model, tmp_path / "a", verify=lambda directory: check_written(model, directory, [inputs]))
    assert (tmp_path / "a" / "spectrim.json").exists()
    assert model.training


def test_the_first_module_that_differs_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    model = factored("llama")

    def verify(directory: Path) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.A.weight.mul_(1.1)
        check_written(model, directory, [text_inputs(model)])

    with pytest.raises(CheckpointError, match=r"first in 'model\.layers\.1\.mlp\.up_proj\.A'"):
        save(model, tmp_path / "a", verify=verify)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_load_is_not_left(tmp_path: Path) -> None:
    model = factored("llama")

    def verify(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        check_written(model, directory, [text_inputs(model)])

    with pytest.raises(CheckpointError, match="would not load again"):
        save(model, tmp_path / "a", verify=verify)
    assert not list(tmp_path.iterdir())


def test_samples_that_the_model_does_not_run_on_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["llama"]()
    good = text_inputs(model)
    with caplog.at_level(logging.WARNING, "spectrim"):
        assert runnable(model, [{"input_ids": torch.tensor([[10**6]])}, good]) == [good]
    assert caplog.messages == ["the checkpoint is not compared with the model in memory: index out of range in self"]


def test_a_compressed_model_that_does_not_run_is_not_written(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) if type(mlp.gate_proj) is nn.Linear else 1 / 0
    with pytest.raises(CheckpointError, match=r"the compressed model does not run \(division by zero\)"):
        compress(model, tmp_path / "a", recipe="svd", retain=0.6)
    assert not list(tmp_path.iterdir())


class Noisy(hf.LlamaForCausalLM):
    """A model that draws random numbers; `drift` is what every run of it adds."""

    noise = 0.3
    drift = 0.0
    runs = 0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        self.runs += 1
        output.logits = output.logits + self.noise * torch.randn_like(output.logits) + self.drift * self.runs
        return output


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_models_with_noise_or_a_state_are_written(
    drift: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Noisy(hf.LlamaConfig(**TEXT)).eval()
    model.drift = drift
    state = torch.get_rng_state()
    samples = runnable(model, [text_inputs(model)])
    assert torch.equal(torch.get_rng_state(), state)
    with caplog.at_level(logging.WARNING, "spectrim"):
        save(factored("", model), tmp_path / "a", verify=lambda path: check_written(model, path, samples))
    assert ("change from run to run" in caplog.text) == bool(drift)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma4_text"])
def test_rounded_buffers_are_at_most_a_line_of_logging(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`model.bfloat16()` rounds the frequencies of rotary embeddings, which a checkpoint does not hold."""
    model = factored("", {**FAMILIES, **FURTHER}[family]()).bfloat16()
    samples = [text_inputs(model, length=64)]
    with caplog.at_level(logging.WARNING, "spectrim"):
        save(model, tmp_path / "a", verify=lambda path: check_written(model, path, samples))
    found = [record.getMessage() for record in caplog.records if record.name == "spectrim"]
    assert all("all tensors are the same" in message for message in found)


def test_modes_of_modules_stay(tmp_path: Path) -> None:
    model = factored("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    save(model, tmp_path / "a", verify=lambda path: check_written(model, path, [text_inputs(model)]))
    assert [module.training for module in model.modules()] == modes


def test_no_second_copy_where_memory_has_no_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    model = factored("llama")
    with caplog.at_level(logging.WARNING, "spectrim"):
        save(model, tmp_path / "a", verify=lambda path: check_written(model, path, [text_inputs(model)]))
    assert "memory holds no second copy" in caplog.text


class Drifting(hf.LlamaForCausalLM):
    """A model whose checkpoint cannot hold what it computes: a number beside its tensors."""

    def __init__(self, config: hf.LlamaConfig) -> None:
        super().__init__(config)
        self.gain = 1.0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.gain
        return output


def test_compress_compares(tmp_path: Path) -> None:
    model = Drifting(hf.LlamaConfig(**TEXT)).eval()
    compress(model, tmp_path / "a", recipe="svd", retain=0.6)
    model = Drifting(hf.LlamaConfig(**TEXT)).eval()
    model.gain = 2.0
    with pytest.raises(CheckpointError, match="first in 'Drifting'"):
        compress(model, tmp_path / "b", recipe="svd", retain=0.6)
    assert not (tmp_path / "b").exists()
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


def test_families_have_a_forward_to_compare() -> None:
    """Tokens alone run through every family, so that a recipe without samples is checked, too."""
    for family in ("llama", "qwen2_5_vl", "gemma3", "mllama"):
        model = FAMILIES[family]()
        assert model(**{k: v[:1] for k, v in model.dummy_inputs.items()}).logits.isfinite().all()
