"""Calibration by one process and by two that torchrun starts: seconds of each, and how far the sums differ.

    OMP_NUM_THREADS=1 python benchmarks/processes.py OUT [--model demo] [--samples 64] [--seqlen 256]

Each process has one thread and runs one sample at a time, since samples that run together are rounded differently.
Seconds are those of gathering and writing, as `calibrate` says them, without loading.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from spectrim.calibrate import Statistics


def run(model: str, out: Path, processes: int, samples: int, seqlen: int) -> Statistics:
    """The statistics that so many processes gather."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "spectrim"]
    command += ["calibrate", model, "-o", str(out), "--samples", str(samples), "--seqlen", str(seqlen)]
    command += ["--batch-size", "1"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return Statistics.open(out)


def difference(one: Statistics, other: Statistics) -> float:
    """The largest difference of two moments, as a share of the largest entry of the moment."""
    most = 0.0
    for name in one.manifest.blocks:
        for modality in one.manifest.data.modalities:
            a, b = (x.moment(name, modality) for x in (one, other))
            c, d = (x.output(name, modality) for x in (one, other))
            pairs = [(a.second, b.second)] if a is not None and b is not None else []
            pairs += [(c.sums[part], d.sums[part]) for part in c.sums] if c is not None and d is not None else []
            assert (a is None, c is None) == (b is None, d is None)
            most = max([most, *(float((x - y).abs().max() / x.abs().max().clamp_min(1e-300)) for x, y in pairs)])
    return most


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    args = parser.parse_args()
    found = {n: run(args.model, args.out / str(n), n, args.samples, args.seqlen) for n in (1, 2)}
    seconds = {n: (statistics.cost() or {})["actual"]["seconds"] for n, statistics in found.items()}
    print("| processes | seconds | × one | largest difference of sums |\n|---|---|---|---|")
    print(f"| 1 | {seconds[1]:.1f} | 1 | |")
    print(f"| 2 | {seconds[2]:.1f} | {seconds[2] / seconds[1]:.2f} | {difference(found[1], found[2]):.0e} |")


if __name__ == "__main__":
    main()
