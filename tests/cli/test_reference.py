"""The pages of docs/reference/ are those that the code makes."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["reference"]


def test_every_page_is_current(reference, monkeypatch):
    monkeypatch.setenv("COLUMNS", "31")  # of which nothing may depend
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
    assert there == reference.pages(), "run `python tools/reference.py`"


def test_a_page_has_every_option_with_type_default_and_help(reference):
    text = reference.pages()["calibrate.md"]
    assert "spectrim calibrate MODEL --out PATH [OPTIONS]" in text
    for row in (
        "| `-o`, `--out` | path | required | The statistics directory to write or to finish. |",
        "| `--labels` | `given` or `sampled` | `given` | Of gradients: the samples' own tokens, or drawn from the "
        "model (true Fisher). |",
        "| `--curvature`, `--no-curvature` | flag | `true` | Gather output gradients as well (spectrim, laser and "
        "curvature need them). |",
        "| `--log-file` | path | – | Append everything to this file, with the time. |",
        "| `thorough` | 256 | `compensate.samples=128`, `tune.epochs=4`, `tune.samples=128` |",
    ):
        assert row in text.splitlines()
