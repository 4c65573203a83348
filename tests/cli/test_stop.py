"""A stopped command says how to go on, and the same command does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from families import FAMILIES
from helpers.command import run
from helpers.samples import image_folder, llava_processor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FAMILIES["llava"]().save_pretrained(tmp_path / "model")
    llava_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "words.txt").write_text(" ".join(f"w{(7 * i * i + 3 * i) % 115 + 2}" for i in range(10_000)))
    image_folder(tmp_path / "images", 80)
    return tmp_path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_compress_goes_on_from_the_statistics_beside_its_output(folder, number, code, monkeypatch, capsys):
    command = [
        sys.executable, "-m", "spectrim", "compress", "model", "-o", "out", "--retain", "0.5", "--recipe", "jw-svd",
        "--text", "words.txt", "--images", "images", "--samples", "80", "--seqlen", "96", "--batch-size", "1",
        "--checkpoint-seconds", "0",
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        manifest = folder / "out.stats" / "manifest.json"
        while not manifest.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == code, err
    assert out.strip() == f"statistics: {folder / 'out.stats'}"
    assert "spectrim: stopped; the same command goes on from" in err
    assert "Traceback" not in err
    assert not (folder / "out").exists()
    first = manifest.read_text()
    assert '"complete": false' in first
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"complete": true' in manifest.read_text()
    assert (folder / "out" / "config.json").exists()
    lines = done.stdout.splitlines()
    assert len(lines) == 2  # results are never folded
    assert lines[1].startswith(f"{folder / 'out'}: ")
    monkeypatch.chdir(folder)
    code, out, err = run(capsys, *command[3:])
    assert (code, out) == (2, "")
    assert "out" in err
    assert not list(folder.glob("spectrim-*"))
