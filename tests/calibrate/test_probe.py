"""A calibration that is estimated first gathers the same, and its estimate is of what it does."""

import json
import logging
import time

import pytest
import torch

from families import FAMILIES
from helpers.samples import processor
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate, run
from spectrim.calibrate.manifest import COST_FILE
from spectrim.calibrate.probe import forget_peak, peak_memory
from spectrim.calibrate.size import statistics_bytes

OPTIONS = {"samples": 6, "seqlen": 16, "batch_size": 2, "curvature": True}


def gathered(directory):
    """Digests of all files of moments."""
    manifest = Statistics.open(directory).manifest
    return {unit: {block: file.sha256 for block, file in one.files.items()} for unit, one in manifest.gathered.items()}


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_the_probe_changes_nothing_and_both_are_kept(family, words, tmp_path, caplog):
    model, given = FAMILIES[family](), {"processor": processor(family), "text": words, **OPTIONS}
    plain = calibrate(model, tmp_path / "plain", **given)
    assert plain.cost() is None
    with caplog.at_level(logging.INFO, "spectrim"):
        found = calibrate(model, tmp_path / "estimated", **given, estimate=True)
    assert gathered(tmp_path / "estimated") == gathered(tmp_path / "plain")
    assert found.cost() == json.loads((tmp_path / "estimated" / COST_FILE).read_text())
    estimate, actual = found.cost()["estimate"], found.cost()["actual"]
    files = sum(path.stat().st_size for path in (tmp_path / "plain").glob("*.safetensors"))
    sums = estimate["disk"]
    assert 0.5 * files < sums < files  # these have headers, and are small here
    assert actual["disk"] > sums
    said = [message for message in caplog.messages if message.startswith("calibrate: ")]
    assert [" ".join(line.split()[:2]) for line in said] == ["calibrate: will", "calibrate: took"]


def test_the_time_is_that_of_the_steps(words, tmp_path, monkeypatch):
    batch, sample = run.run_batch, run.run_gradients

    def slow(step, seconds):
        def called(*arguments, **options):
            time.sleep(seconds)
            return step(*arguments, **options)

        return called

    monkeypatch.setattr(run, "run_batch", slow(batch, 0.1))
    monkeypatch.setattr(run, "run_gradients", slow(sample, 0.2))
    options = {"processor": processor("llama"), "text": words, **OPTIONS}
    cost = calibrate(FAMILIES["llama"](), tmp_path / "s", **options, estimate=True).cost()
    slept = 3 * 0.1 + 3 * 0.2  # three batches of two, forward and backward
    assert slept < cost["actual"]["seconds"]
    assert slept < cost["estimate"]["seconds"] < 1.5 * slept


def test_what_is_left_of_a_stopped_run_is_estimated(words, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_batch", lambda *a, step=run.run_batch, **o: (time.sleep(0.2), step(*a, **o)))
    options = {"processor": processor("llama"), "text": words, **OPTIONS, "batch_size": 1, "curvature": False}

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(FAMILIES["llama"](), tmp_path / "s", **options, checkpoint_seconds=0, progress=stop)
    left = calibrate(FAMILIES["llama"](), tmp_path / "s", **options, estimate=True).cost()["estimate"]
    assert 0.35 < left["seconds"] < 1.0  # of six, two or three are left; all would take 1.2


@pytest.mark.parametrize("family", ["llama", "llava"])
@pytest.mark.parametrize("curvature", [False, True])
def test_bytes_of_statistics_come_from_shapes(family, curvature, words, tmp_path):
    model = FAMILIES[family]()
    given = {**OPTIONS, "curvature": curvature, "gradients": True}
    found = calibrate(model, tmp_path / "s", processor=processor(family), text=words, **given)
    predicted = statistics_bytes(anatomy(model), found.manifest.settings, found.manifest.data.modalities)
    held = 0
    for path in (tmp_path / "s").glob("*.safetensors"):
        content = path.read_bytes()
        held += len(content) - 8 - int.from_bytes(content[:8], "little")
    outputs = [name for one in found.manifest.gathered.values() for name in one.outputs]
    held -= sum(4 * 8 * found.manifest.heads.get(name, 1) for name in outputs)  # traces
    # No gradient reaches the last block of a tower whose features are those of the block before.
    assert held <= predicted <= 1.05 * held
    assert predicted == held or (family, curvature) == ("llava", True)


def test_a_peak_is_forgotten():
    """Each job tells its own: what an earlier one of the same process took is not counted again."""
    device, size = torch.device("cpu"), 400_000_000
    forget_peak(device)
    before = peak_memory(device)
    torch.zeros(size // 4).add_(1)
    assert peak_memory(device) > before + 0.9 * size
    forget_peak(device)
    assert peak_memory(device) < before + 0.1 * size
