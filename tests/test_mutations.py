"""The table of changes that tools/mutations.py makes fits the source as it is, and what it reports of its runs."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "tools" / "mutations.py"


def mutations(*arguments) -> None:
    run = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_every_change_of_the_table_can_be_made():
    mutations("--check")


def test_a_report_counts_what_the_last_run_of_each_change_came_to(tmp_path):
    first, second, page = tmp_path / "a.log", tmp_path / "b.log", tmp_path / "page.md"
    first.write_text(
        "  9 s  unchanged: passed  tests/maths/test_pivots.py\n"
        "  6 s  SURVIVED  maths/pivots.py: no swaps\n"
        "  6 s  equivalent (because of a file.py: so)  maths/pivots.py: one swap at a time\n"
        "  6 s  SURVIVED  maths/pivots.py: rows not in order\n"
        "  6 s  killed  maths/pivots.py: a change that is no longer there\n"
    )
    second.write_text("123 s  killed  maths/pivots.py: no swaps\n")
    mutations("--report", page, first, second)
    (row,) = [line for line in page.read_text().splitlines() if line.startswith("| maths/pivots.py ")]
    assert [part.strip() for part in row.split("|")][2:7] == ["6", "3", "1", "1", "1"]
    assert "Survived: maths/pivots.py: rows not in order." in page.read_text()
