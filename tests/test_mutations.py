"""The table of changes that tools/mutations.py makes fits the source as it is."""

import subprocess
import sys
from pathlib import Path


def test_every_change_of_the_table_can_be_made():
    script = Path(__file__).parents[1] / "tools" / "mutations.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
