"""`torchrun … -m spectrim calibrate`: several processes gather one set of statistics."""

import subprocess
import sys

import pytest
import torch

from spectrim.calibrate import Statistics


@pytest.mark.slow
def test_two_processes_of_torchrun_gather_the_sums_of_one(tmp_path):
    found, said = {}, {}
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "spectrim"]
        command += ["calibrate", "demo", "-o", str(tmp_path / str(processes)), "--samples", "5", "--seqlen", "24"]
        command += ["--batch-size", "1"]  # whatever runs together is rounded differently in float32
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[processes], said[processes] = Statistics.open(tmp_path / str(processes)), done.stdout
    assert said[2] == said[1].replace(str(tmp_path / "1"), str(tmp_path / "2"))  # the first process speaks alone
    for name in found[1].manifest.blocks:
        for modality in ("text", "image"):
            for read in ("moment", "output"):
                one, two = (getattr(statistics, read)(name, modality) for statistics in found.values())
                assert (one is None) == (two is None)
                if one is None:
                    continue
                one, two = (x.second if read == "moment" else x.sums["output"] for x in (one, two))
                torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6 * float(one.abs().max()))
