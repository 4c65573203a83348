"""Models with latent caches by the kernel for a GPU, in Triton's interpreter."""

from typing import Any

import pytest
import torch

from compressed import factored
from families import FAMILIES, FURTHER, text_inputs
from spectrim.kernels import cuda
from spectrim.latent import LatentCache

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of the name past_key_values
pytest.importorskip("triton", reason="triton is not installed")


def logits(model: Any, inputs: dict[str, torch.Tensor], **how: Any) -> torch.Tensor:
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        return torch.stack(model.generate(**inputs, past_key_values=LatentCache(model, **how), **options).logits)


INT8 = {"latent_dtype": "int8", "folded": True}


@pytest.mark.parametrize(("family", "how"), [("llama", {}), ("qwen2", INT8), ("qwen3", {}), ("qwen3", INT8)], ids=str)
def test_a_model_gives_the_same_logits(family, how, monkeypatch):
    """Grouped queries and left padding; biases; normalised keys."""
    model = factored(family, None if family in FAMILIES else FURTHER[family](), form="headwise")
    inputs = text_inputs(model, batch=2)
    inputs["attention_mask"][1, :4] = 0
    expected = logits(model, inputs, **how)
    monkeypatch.setattr(cuda, "takes", lambda x: True)
    kernels = cuda.latent_kernels()
    steps = []
    decode = kernels.decode
    monkeypatch.setattr(kernels, "decode", lambda *a, **k: steps.append(1) or decode(*a, **k))
    found = logits(model, inputs, **how)
    assert len(steps) == 2 * model.config.num_hidden_layers  # all tokens but the first
    torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-4 * expected.abs().max()))


def test_without_triton_torch_runs(monkeypatch):
    model = factored("llama", None, form="headwise")
    expected = logits(model, text_inputs(model))
    monkeypatch.setattr(cuda, "takes", lambda x: True)
    monkeypatch.setattr(cuda, "latent_kernels", lambda: None)
    assert torch.equal(logits(model, text_inputs(model)), expected)
