"""The allocation by predicted losses, against equal shares for all linears: divergence from the dense model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import families
from helpers.samples import WORDS, image_folder, processor
from spectrim.calibrate import calibrate
from spectrim.calibrate.data import source_data
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.evaluate.divergence import Predictions
from spectrim.pipeline import compression

BUDGETS = (0.8, 0.6, 0.4, 0.3, 0.2)


def model_of(name: str, folder: Path) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """A model, its processor, and its sources of samples."""
    if name == "demo":
        source = resolve("demo")
        model = load(source, dtype=torch.float32)
        return model, load_processor(source), {"text": "builtin", "images": "builtin", "samples": 24, "seqlen": 64}
    (folder / "words.txt").write_text(WORDS * 4)
    sources: dict[str, Any] = {"text": str(folder / "words.txt"), "samples": 24, "seqlen": 32}
    if name == "llava":
        sources["images"] = str(image_folder(folder / "images", 24))
    return families.FAMILIES[name](), processor(name), sources


@pytest.mark.parametrize("name", [pytest.param("demo", marks=pytest.mark.slow), "llama", "llava"])
def test_predicted_losses_are_never_worse_than_equal_shares(name: str, tmp_path: Path) -> None:
    """Sums of the nats of text and images, on samples with another seed than those of the statistics."""
    model, reader, sources = model_of(name, tmp_path)
    images = sources.pop("images", None)
    statistics = calibrate(model, tmp_path / "s", processor=reader, images=images, **sources)
    data = source_data(model, reader, statistics, sees=images is not None, seed=5)
    found: dict[str, list[float]] = {}
    dense = Predictions(tmp_path / "dense")
    (tmp_path / "dense").mkdir()
    dense.gather(model, data, tokens=1000, seed=5, progress=None)
    for rule in ("loss-aware", "uniform"):
        with compression(model, "curvature", stats=statistics, changes={"allocation.rule": rule}) as prepared:
            for budget in BUDGETS:
                with prepared.applied(prepared.plan(budget)) as small:
                    found.setdefault(rule, []).append(sum(one.mean for one in dense.compare(small)))
    assert all(aware <= even for aware, even in zip(found["loss-aware"], found["uniform"], strict=True)), found
