"""What further budgets cost: compress one model to one budget and to three, from the same statistics.

    python benchmarks/three_budgets.py demo

Each run starts without spectra, decomposes, plans, factors and writes the checkpoints. Prints the ratio of the times.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch

from spectrim.calibrate import calibrate
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.pipeline import compression

BUDGETS = (0.8, 0.6, 0.4)


def main() -> None:
    """Calibrate once, then time both runs, twice each, in turn; the faster of each counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="jw-svd")
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    source = resolve(args.model)
    processor = load_processor(source)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        model = load(source, dtype=torch.float32)
        statistics = calibrate(model, home / "statistics", processor=processor, samples=args.samples, curvature=False)
        best = {1: float("inf"), 3: float("inf")}
        for turn in range(2):
            for count in best:
                shutil.rmtree(statistics.path / "spectra", ignore_errors=True)
                started = time.perf_counter()
                with compression(model, args.recipe, stats=statistics) as prepared:
                    for budget in BUDGETS[:count]:
                        prepared.save(prepared.plan(budget), home / f"{turn}-{count}-{budget}", processor=processor)
                best[count] = min(best[count], time.perf_counter() - started)
    print(f"one budget {best[1]:.2f} s, three budgets {best[3]:.2f} s, ratio {best[3] / best[1]:.2f}")


if __name__ == "__main__":
    main()
