"""Model code that gives linears their input by name."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from compressed import logits, low_rank
from families import FAMILIES
from helpers.samples import WORDS, word_tokenizer
from spectrim import compress
from spectrim.calibrate import calibrate
from spectrim.checkpoint import load


def by_name(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:

        def forward(x: torch.Tensor, mlp=layer.mlp) -> torch.Tensor:
            return mlp.down_proj(input=mlp.act_fn(mlp.gate_proj(input=x)) * mlp.up_proj(input=x))

        layer.mlp.forward = forward
    return model


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(WORDS)
    return str(path)


def test_moments_and_gradients_are_those_of_calls_by_position(words: str, tmp_path: Path) -> None:
    given = {"processor": word_tokenizer(), "text": words, "samples": 4, "seqlen": 16}
    given |= {"gradients": True, "curvature": True, "answer_tokens": 2}
    expected = calibrate(FAMILIES["llama"](), tmp_path / "a", **given)
    found = calibrate(by_name(FAMILIES["llama"]()), tmp_path / "b", **given)
    for name in ("model.layers.1.mlp.gate_proj", "model.layers.0.mlp.down_proj"):
        assert torch.equal(found.moment(name, "text").second, expected.moment(name, "text").second)
        sums = [statistics.output(name, "text").sums for statistics in (found, expected)]
        assert all(torch.equal(sums[0][part], sums[1][part]) for part in sums[1])


@pytest.mark.parametrize("kind", ["none", "anchored", "adacomp"])
def test_such_a_model_is_compressed_and_runs(kind: str, words: str, tmp_path: Path) -> None:
    options = {"text": words, "images": None, "samples": 4, "seqlen": 16, "processor": word_tokenizer()}
    changes = {"compensate.kind": kind}
    small = compress(
        by_name(FAMILIES["llama"]()), tmp_path / "a", recipe="svd-llm", retain=0.6, changes=changes, **options
    )
    assert low_rank(small)
    assert torch.equal(logits(by_name(load(tmp_path / "a"))), logits(small))
