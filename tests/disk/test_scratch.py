"""The temporary folder: gone at the end, and after a kill at the next start, but never while its process lives."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from spectrim.disk.scratch import scratch

CODE = """
import time
from spectrim.disk.scratch import scratch
with scratch() as folder:
    (folder / "statistics").mkdir()
    (folder / "statistics" / "moments").write_text("x")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def living() -> tuple[subprocess.Popen[str], Path]:
    """A process inside a scratch folder, and that folder."""
    process = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_the_folder_is_removed_at_the_end_whatever_happens(temporary):
    def work() -> None:
        with scratch() as folder:
            assert folder.parent == temporary
            (folder / "file").write_text("x")
            raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        work()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_goes_and_what_a_living_one_uses_stays(temporary):
    killed, left = living()
    alive, used = living()
    with killed, alive:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert (left / "statistics" / "moments").exists()
        with scratch() as folder:
            assert folder.exists()
            assert not left.exists()
            assert (used / "statistics" / "moments").exists()
        alive.kill()
    with scratch():
        assert not used.exists()


def test_folders_that_are_not_ours_stay(temporary):
    (temporary / "spectrim-demo").mkdir()
    (temporary / "spectrim-demo" / "results.json").write_text("{}")
    (temporary / "real").mkdir()
    (temporary / "real" / ".spectrim-lock").write_text("")
    (temporary / "spectrim-link").symlink_to(temporary / "real")
    with scratch():
        pass
    assert (temporary / "spectrim-demo" / "results.json").exists()
    assert (temporary / "real" / ".spectrim-lock").exists()
