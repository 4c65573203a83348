"""The small forms of the GPU benchmarks run on a CPU, so that the large ones do not fail for want of care."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run one of them as its command does; returns what it printed."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for file in FOLDER.glob("*.py"):  # gone again afterwards, with their plain names
        monkeypatch.setitem(sys.modules, file.stem, None)
        monkeypatch.delitem(sys.modules, file.stem)

    def run(name: str, *arguments: str) -> str:
        importlib.import_module(name).main(list(arguments))
        return capsys.readouterr().out

    return run


def test_linears(run, tmp_path):
    text = run("linears", "--small", "--json", str(tmp_path / "rows.json"))
    record = json.loads((tmp_path / "rows.json").read_text())
    assert {row["form"] for row in record["linears"]} == {"dense", "factors 40 %", "int4", "int3", "int2"}
    assert {row["rows"] for row in record["linears"]} == {1, 8, 64}
    assert len(record["linears"]) == 5 * 5 * 3
    assert len(record["steps"]) == 3
    bytes_of = {form: found["bytes"] for form, found in record["steps"].items()}
    assert 0.15 < bytes_of["int3"] / bytes_of["dense"] < 0.25
    assert 0.15 < bytes_of["factors 20 %"] / bytes_of["dense"] < 0.25
    assert text.count("PASS") + text.count("FAIL") == 3


def test_what_does_not_fit_into_the_time_is_left_out_and_named(run):
    text = run("linears", "--small", "--limit", "0")
    assert "out of time: 512 × 256 dense is left out" in text
    assert text.count("not measured") == 3


def test_latent_decode(run, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    text = run("latent_decode", "--small", "--json", str(tmp_path / "rows.json"))
    record = json.loads((tmp_path / "rows.json").read_text())
    assert [row["way"] for row in record["layer"]] == ["latents", "full", "sdpa", "rebuilt"] * 4
    assert max(row["error"] for row in record["layer"]) < 0.01
    assert [row["tokens"] for row in record["model"]] == [32, 64]
    assert "the largest error is" in text
    assert text.count("PASS") + text.count("FAIL") == 9


def test_experts(run, tmp_path):
    text = run("experts", "--small", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["way"] for row in rows} == {"dense, grouped_mm", "dense, eager", "4 bits"}
    assert len(rows) == 4 * 3
    assert text.count("PASS") + text.count("FAIL") == 4


def test_experts_in_grouped_products_and_one_by_one(run, grouped_products):
    run("experts", "--small", "--limit", "0")  # imports it
    x, weights = torch.randn(3, 64).bfloat16(), torch.ones(3, 2).bfloat16()
    routes, found = torch.tensor([[0, 1], [1, 2], [0, 2]]), {}
    for name, experts in sys.modules["experts"].ways_of(True, torch.device("cpu")).items():
        grouped_products.clear()
        with torch.no_grad():
            found[name] = experts(x, routes, weights).float()
        assert grouped_products == [8, 8, 8] * (name == "4 bits")
    error = (found["4 bits"] - found["4 bits, one by one"]).norm() / found["4 bits"].norm()
    assert error < 0.02


def test_scale(run, tmp_path):
    text = run("scale", "--small", "--json", str(tmp_path / "rows.json"))
    record = json.loads((tmp_path / "rows.json").read_text())
    assert all(row["spectrum"] > 0 and row["rounding"] > 0 for row in record["linears"].values())
    assert sum(row["count"] for row in record["linears"].values()) == 7
    assert all(parts["passes"] > 0 for parts in record["calibration"].values())
    assert list(record["calibration"]) == ["without", "with curvature"]
    assert "rounding of 2 blocks" in text
