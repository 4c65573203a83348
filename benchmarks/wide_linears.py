"""Seconds and memory of the steps of one wide linear, in copies of its larger metric: what `--memory` has to hold.

    python benchmarks/wide_linears.py [--narrow 1024] [--wide 6144]

Once with the wide side as inputs (`down`) and once as outputs (`gate`); random weights and metrics in float64. The
metrics themselves are held before each step, and are not counted.
"""

import argparse
import time
from collections.abc import Callable

import torch

from spectrim.calibrate.probe import forget_peak, held_memory, peak_memory
from spectrim.maths.closed_form import anchored_weight, blended, correction
from spectrim.maths.decompose import OutputMetric, decompose
from spectrim.maths.removal import fitted, removal
from spectrim.maths.roots import BlockRoot
from spectrim.maths.rounding import Grid, conditional, quantize

CPU = torch.device("cpu")


def metric(size: int) -> torch.Tensor:
    """A positive definite matrix of decaying spectrum."""
    X = torch.randn(size, size // 2, dtype=torch.float64) / torch.arange(1, size // 2 + 1).double().sqrt()
    M = X @ X.T
    M.diagonal().add_(0.01 * M.diagonal().mean())
    return M


def measured(step: Callable[[], object], unit: int) -> str:
    """Seconds, and bytes beyond those held before, as multiples of `unit`."""
    forget_peak(CPU)
    before, began = held_memory(CPU), time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    return f"{seconds:.1f} | {(peak_memory(CPU) - before) / unit:.1f}"


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--narrow", type=int, default=1024)
    parser.add_argument("--wide", type=int, default=6144)
    args = parser.parse_args()
    torch.manual_seed(0)
    unit = 8 * args.wide**2
    print(f"| step, width {args.wide} | down: s | copies | gate: s | copies |\n|---|---|---|---|---|")
    rows: dict[str, list[str]] = {}
    for out, size in ((args.narrow, args.wide), (args.wide, args.narrow)):
        W, C, G = torch.randn(out, size), metric(size), metric(out)
        output = OutputMetric((BlockRoot(G[None]),), torch.ones(1).double())
        cross = W.double() @ C
        steps: dict[str, Callable[[], object]] = {
            "decompose": lambda W=W, C=C, o=output: decompose(W, C, o),
            "output metric as a matrix": lambda o=output, out=out: o.dense(out),
            "weights of rounding residuals": lambda W=W, C=C, G=G: [conditional(M, len(M), W) for M in (C, G)],
            "4 bits with feedback on both sides": lambda W=W, C=C, G=G: quantize(W, Grid(4, None), C, G),
            "correction of compensation": lambda W=W, C=C, t=cross: correction(W, C, t, C, 1e-3),
            "compensated weight": lambda W=W, C=C, t=cross: anchored_weight(W, *blended(W, C, t, C, 0.5), 1e-3),
        }
        if size == args.wide:
            kept = torch.arange(args.wide // 2)
            steps["order of units"] = lambda W=W, C=C, G=G: removal(W, C, G)
            steps["refitted columns, half of them"] = lambda W=W, C=C, k=kept: fitted(W, k, C)
        for name, step in steps.items():
            rows.setdefault(name, []).append(measured(step, unit))
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join([*cells, '– | –'][:2])} |")


if __name__ == "__main__":
    main()
