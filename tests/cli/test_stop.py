"""A stopped command says how to go on, and the same command does."""

import os
import signal
import time
from pathlib import Path

import pytest

from families import FAMILIES
from helpers.command import run
from helpers.forks import Fork, fork
from helpers.samples import image_folder, llava_processor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FAMILIES["llava"]().save_pretrained(tmp_path / "model")
    llava_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "words.txt").write_text(" ".join(f"w{(7 * i * i + 3 * i) % 115 + 2}" for i in range(10_000)))
    image_folder(tmp_path / "images", 40)
    return tmp_path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_compress_goes_on_from_the_statistics_beside_its_output(folder, number, code, monkeypatch, capsys):
    command = [
        "compress", "model", "-o", "out", "--retain", "0.5", "--recipe", "jw-svd",
        "--text", "words.txt", "--images", "images", "--samples", "40", "--seqlen", "96", "--batch-size", "1",
        "--checkpoint-seconds", "0",
    ]  # fmt: skip
    options = {"folder": folder, "environment": {"TMPDIR": str(folder)}}
    stopped = Fork("-m", "spectrim", *command, **options)
    manifest = folder / "out.stats" / "manifest.json"
    while not manifest.exists() and stopped.process.is_alive():
        time.sleep(0.02)
    os.kill(stopped.process.pid, number)
    done = stopped.done()
    assert done.returncode == code, done.stderr
    assert done.stdout.strip() == f"statistics: {folder / 'out.stats'}"
    assert "spectrim: stopped; the same command goes on from" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()
    assert '"complete": false' in manifest.read_text()
    if number == signal.SIGTERM:
        return
    done = fork("-m", "spectrim", *command, **options)
    assert done.returncode == 0, done.stderr
    assert '"complete": true' in manifest.read_text()
    assert (folder / "out" / "config.json").exists()
    lines = done.stdout.splitlines()
    assert len(lines) == 2  # results are never folded
    assert lines[1].startswith(f"{folder / 'out'}: ")
    monkeypatch.chdir(folder)
    code, out, err = run(capsys, *command)
    assert (code, out) == (2, "")
    assert "out" in err
    assert not list(folder.glob("spectrim-*"))
