"""The walk runs the layers that a checkpoint stores: what it compensates for is what the finished model does."""

from collections import defaultdict

import pytest
import torch

import families
from helpers.samples import processor
from helpers.streams import batches, record
from spectrim.calibrate import calibrate
from spectrim.checkpoint import load
from spectrim.compensate.units import Unit
from spectrim.pipeline import compress
from spectrim.storage import stored_layers

FORMS = {
    "low-rank": ("spectrim", 0.6, {"storage.pivoted": False}),
    "pivoted": ("spectrim", 0.6, {}),
    "by head": ("laser", 0.6, {"compensate.kind": "anchored"}),
    "by adaComp": ("adasvd", 0.6, {"storage.pivoted": True}),
    "integers": ("spectrim", 0.3, {"quantize.bits": "auto"}),
    "3 bits": ("jw-svd+gptq", 0.15, {"quantize.bits": 3, "compensate.kind": "anchored"}),
}


@pytest.fixture(scope="module")
def dense(words, tmp_path_factory):
    """A checkpoint of 16 bits, whose rounding is no small matter, and its statistics."""
    root = tmp_path_factory.mktemp("dense")
    families.FAMILIES["llava"]().to(torch.bfloat16).save_pretrained(root / "model")
    given = {"processor": processor("llava"), "text": words, "samples": 8, "seqlen": 16, "batch_size": 4}
    return root / "model", calibrate(load(root / "model"), root / "s", **given, curvature=True)


@pytest.mark.parametrize("form", FORMS)
def test_linears_read_in_the_walk_what_they_read_in_the_finished_model(form, dense, words, tmp_path, monkeypatch):
    directory, statistics = dense
    recipe, retain, changes = FORMS[form]
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    real = Unit.tap

    def tap(self, call, *, small, **wanted):
        found = real(self, call, small=small, **wanted)
        if small:
            for name in wanted["x"]:
                assert not found.x[name].requires_grad
                seen[name].append(found.x[name])
        return found

    monkeypatch.setattr(Unit, "tap", tap)
    changes = {"compensate.samples": None, "compensate.buckets": None, "compensate.weight": 0.3, **changes}
    given = {"stats": statistics, "processor": processor("llava"), "changes": changes}
    compress(load(directory), tmp_path / "small", recipe=recipe, retain=retain, **given)
    small = load(tmp_path / "small", runtime="reference")  # as the walk runs it
    by_pivots = any(layer.spec.get("pivoted") for layer in stored_layers(small).values())
    assert by_pivots == (form in ("pivoted", "by adaComp"))
    inputs = sorted(batches(small, "llava", words, samples=8), key=lambda pair: pair[0] != "image")
    finished: dict[str, list[torch.Tensor]] = defaultdict(list)
    for _, batch in inputs:
        for name, (x, _) in record(small, batch, seen).items():
            finished[name].append(x)
    assert len(seen) > 10
    for name, walked in seen.items():
        for x, y in zip(walked, finished[name], strict=True):
            # Far less than one rounding of a weight; where all goes well, not a bit.
            assert (x - y.reshape(x.shape)).norm() <= 1e-4 * y.norm(), name
