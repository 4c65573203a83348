"""``--dry-run`` says what would be read, gathered and written, and runs and writes nothing."""

import re
import sys
from pathlib import Path

import pytest

import spectrim
from helpers.command import run
from spectrim.demo import resolve

AMOUNT = re.compile(r"([\d.]+) (bytes|kB|MB|GB)")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Statistics and a checkpoint of the built-in model."""
    path, source = tmp_path_factory.mktemp("dry"), resolve("demo")
    options = {"samples": 4, "seqlen": 16}
    processor = spectrim.load_processor(source)
    spectrim.calibrate(spectrim.load(source), path / "stats", processor=processor, **options)
    given = {"stats": path / "stats", "recipe": "laser", "retain": 0.4}
    spectrim.compress("demo", path / "small", **given)
    return path


@pytest.fixture
def nothing_runs(monkeypatch):
    """From here on, whoever loads a model fails the test."""

    def load(*arguments, **options):
        raise AssertionError("a model was loaded")

    for place in ("checkpoint", "checkpoint.read", "pipeline.run", "evaluate.running", "bench.engines"):
        __import__(f"spectrim.{place}")
        monkeypatch.setattr(sys.modules[f"spectrim.{place}"], "load", load)


def tree(home: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in home.rglob("*") if path.is_file()}


def nbytes(line: str) -> float:
    number, unit = AMOUNT.findall(line)[-1]
    return float(number) * {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["anatomy", "demo", "--json", "x.json"], ["would read the model", "would write the results"]),
        (["calibrate", "demo", "-o", "new"], ["would gather moments of inputs", "128 image samples", "statistics new"]),
        (["compress", "demo", "-o", "new", "--retain", "0.3"], ["the built-in text", "new.stats", "at most 5.4 MB"]),
        (
            ["compress", "demo", "-o", "new", "--size", "4MB", "--stats", "stats"],
            ["stats: ", "at most 4.0 MB"],
        ),
        (["plan", "demo", "--retain", "0.3", "--stats", "stats"], ["statistics stats", "spectra and options"]),
        (["inspect", "demo", "--stats", "stats", "-o", "new", "--no-plots"], ["inspection.json in"]),
        (["evaluate", "demo", "small", "--card"], ["the built-in questions", "the card of small"]),
        (["bench", "demo", "small"], ["would read the model small"]),
        (
            ["pareto", "demo", "--stats", "stats", "--sizes", "4MB,30%", "-o", "new"],
            [
                "statistics stats: ",
                "the built-in questions",
                "spectrim-size-4MB",
                "spectrim-retain-0.3",
                "results.json",
            ],
        ),
        (["report", "small", "-o", "page.html"], ["small: ", "the page page.html"]),
        (["demo", "-o", "new"], ["192 text and 192 image samples", "spectrim-40%", "results.json"]),
        (["push", "small", "owner/name"], ["files of small", "owner/name on the hub"]),
    ],
    ids=lambda value: value[0],
)
def test_every_verb_says_it_and_does_nothing(capsys, nothing_runs, home, monkeypatch, arguments, said):
    monkeypatch.chdir(home)
    before = tree(home)
    code, out, err = run(capsys, *arguments, "--dry-run")
    assert (code, err) == (0, "")
    for words in said:
        assert words in out
    assert out.endswith("dry run: nothing was run or written")
    assert tree(home) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "demo", "-o", "new", "--samples", "100000"],
        ["calibrate", "./nowhere", "-o", "new"],
        ["calibrate", "demo", "-o", "new", "--effort", "much"],
        ["calibrate", "demo", "-o", "new", "--curvature-form", "nothing=full"],
        ["compress", "demo", "-o", "new", "--retain", "0.00001", "--stats", "stats"],
        ["compress", "demo", "-o", "new", "--size", "1MB", "--stats", "stats"],
        ["compress", "demo", "-o", "small", "--retain", "0.5", "--stats", "stats"],
        ["plan", "demo", "--size", "1MB", "--stats", "stats"],
        ["evaluate", "demo", "--samples", "0"],
        ["evaluate", "demo", "--text", "none.txt"],
        ["bench", "demo", "--new", "1"],
        ["pareto", "demo", "--stats", "stats", "--sizes", "1MB", "-o", "new", "--tasks", "chess"],
        ["pareto", "demo", "--stats", "stats", "--sizes", "40%,40%", "-o", "new"],
        ["pareto", "demo", "--stats", "nowhere", "--sizes", "40%", "-o", "new"],
        ["report", "nowhere", "-o", "page.html"],
        ["report", "stats", "-o", "page.html"],
        ["report", "small", "-o", "small"],
        ["demo", "--samples", "0"],
        ["push", "stats", "owner/name"],
    ],
    ids=" ".join,
)
def test_mistakes_are_mistakes(capsys, nothing_runs, home, monkeypatch, arguments):
    monkeypatch.chdir(home)
    before = tree(home)
    code, _, err = run(capsys, *arguments, "--dry-run")
    assert code == 2
    assert err.startswith("spectrim: ")
    assert tree(home) == before


def test_bytes_are_those_that_a_run_comes_to(capsys, home, monkeypatch):
    monkeypatch.chdir(home)
    _, out, _ = run(capsys, "calibrate", "demo", "-o", "new", "--samples", "4", "--seqlen", "16", "--dry-run")
    predicted = nbytes(out[out.index("statistics new") :])
    # Of few positions, such as these, it depends on the length of the answers that the model draws.
    assert predicted == pytest.approx(sum(x.stat().st_size for x in (home / "stats").glob("*.safetensors")), rel=0.3)
    _, out, _ = run(capsys, "compress", "demo", "-o", "new", "--retain", "0.4", "--stats", "stats", "--dry-run")
    size = (home / "small" / "model.safetensors").stat().st_size
    assert 0.98 < size / nbytes(out[out.index("the weights of") :]) <= 1.01
