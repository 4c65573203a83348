"""Our Triton kernels compile for GPUs that are not here, and what they take of them is bounded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.slow
TOOL = Path(__file__).parents[2] / "tools" / "kernel_resources.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of a process of its own: in this one, kernels run in the interpreter and cannot be compiled."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run([sys.executable, TOOL, "--json"], env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_target_without_spills(rows):
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_120"}
    assert len(rows) == 3 * len({row["kernel"] for row in rows})
    assert not [row for row in rows if row["spilled"]]


def test_shared_memory_stays_under_the_limit(rows):
    assert not [row for row in rows if row["shared"] > row["limit"]]


def test_unpacking_needs_few_registers(rows):
    assert max(row["registers"] for row in rows if row["kernel"].startswith("unpack")) <= 64
