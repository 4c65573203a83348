"""What the demo prints of its results."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from spectrim.bench import Benchmark, Frontier
from spectrim.bench.measure import Row, Timing
from spectrim.demonstration import Demonstration
from spectrim.evaluate import DirectoryResult, EvaluationReport, Perplexity, TaskScore, VqaScore
from spectrim.evaluate.footprint import Memory
from spectrim.settings import EvaluationOptions

MODELS = {  # bytes, VQA accuracy, perplexity
    "dense": (13_300_000, 0.95, 50.0),
    "svd-40%": (6_500_000, 0.96, 76.0),
    "spectrim-40%": (6_500_100, 0.94, 51.0),
    "svd-llm-30%": (5_400_000, 0.70, 70.0),
    "spectrim-30%": (5_400_050, 0.93, 54.0),
}


@pytest.fixture
def shown() -> Demonstration:
    results, rows = [], []
    for number, (name, (size, accuracy, perplexity)) in enumerate(MODELS.items()):
        task = TaskScore("colour", 100, round(100 * accuracy), accuracy, 0, 1)
        result = DirectoryResult(
            name, name != "dense", "cpu", "float32", size, Memory(None, None, None),
            perplexity=Perplexity(1.0, 1, 1, perplexity, perplexity, 1.0), vqa=VqaScore((task,), accuracy, 100, 1, 100),
        )  # fmt: skip
        results.append(result)
        timing = Timing(1.0 + number, 0.0, 1.0 + number)
        rows.append(Row(name, 1, timing, timing, 1.0, None, size, size, None))
    report = EvaluationReport(
        "2026-01-01T00:00:00+00:00", {}, EvaluationOptions().scored, None, None, "dense", None, tuple(results)
    )
    frontier = Frontier(report, Benchmark(tuple(rows), "2026-01-01", {}, ""))
    return Demonstration(frontier, (), Path("s"), Path("r"), None, "the page needs altair", 1.0)


def test_each_size_begins_with_what_keeps_sight_and_language(shown):
    console = Console(file=io.StringIO(), width=200)
    console.print(shown.table())
    lines = [line.split() for line in console.file.getvalue().splitlines()[2:]]
    assert [line[0] for line in lines] == ["dense", "spectrim-40%", "svd-40%", "spectrim-30%", "svd-llm-30%"]
    assert [" ".join(line[5:]) for line in lines] == ["", "", "language", "", "sight and language"]
    assert lines[2][1:5] == ["6.5", "101", "76.0", "0.50"]


def test_the_lesson_sets_both_kinds_of_calibration_side_by_side(shown):
    assert "by text alone, svd-llm-30% keeps 74% of the answers about images (perplexity 70.0)" in shown.lesson()
    assert "spectrim-30% keeps 98%" in shown.lesson()
