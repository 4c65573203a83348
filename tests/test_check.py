"""A checkpoint is compared with the model in memory before it takes its place."""

import logging
from pathlib import Path

import pytest
import torch
import transformers as hf

from compressed import factored
from families import FAMILIES, TEXT, example_inputs, text_inputs
from spectrim import compress
from spectrim.checkpoint import save
from spectrim.checkpoint.check import check_written
from spectrim.errors import CheckpointError
from spectrim.layers import LowRankLinear


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


def test_a_model_that_does_not_run_on_the_sample_is_saved_unchecked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = factored("llama")
    with caplog.at_level(logging.WARNING, "spectrim"):
        check_written(model, tmp_path / "nowhere", [{"input_ids": torch.tensor([[10**6]])}])
    assert "was not compared" in caplog.text


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
