"""Where adaComp helps and where it cannot: relative error of the backbone's linears of one model, on text moments.

    python benchmarks/adacomp.py demo --retain 0.4

Three starts: the projection in the metric in which the error is measured, plain SVD (a metric of other samples, at its
worst), and the projection with B rounded to few bits, row by row, where only A is fitted again.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.maths.alternating import alternate
from spectrim.maths.decompose import decompose, factors

ROUNDS = (1, 3, 15)
BITS = (4, 3)


def start(W: torch.Tensor, metric: torch.Tensor | None, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the best approximation in a metric."""
    found = decompose(W, metric)
    Q = None if found.Q is None else found.Q[:, :rank]
    return factors(W, found.s[:rank], found.P[:, :rank], Q)


def rounded(B: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row to the nearest of evenly spaced values up to its largest."""
    top = 2 ** (bits - 1) - 1
    step = B.abs().amax(1, keepdim=True).clamp_min(1e-30) / top
    return (B / step).round() * step


def main() -> None:
    """Parse the command line, measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--retain", type=float, default=0.4)
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--stats", type=Path, help="use these statistics")
    args = parser.parse_args()
    source = resolve(args.model)
    model = load(source, dtype=torch.float32)
    sums: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        given = {"text": args.text, "images": None, "samples": args.samples, "seqlen": args.seqlen, "curvature": False}
        statistics = (
            calibrate(model, scratch, processor=load_processor(source), **given)
            if args.stats is None
            else Statistics.open(args.stats)
        )
        linears = [linear for linear in anatomy(model).in_place("backbone") if linear.block is not None]
        for linear in linears:
            W = model.get_submodule(linear.name).weight.detach().double()
            moment = statistics.moment(linear.name, "text")
            C = moment.second / moment.count
            T, rank = W @ C, int(args.retain * linear.params / (linear.out_features + linear.in_features))
            energy = float((T * W).sum())

            def note(name: str, A: torch.Tensor, B: torch.Tensor, W=W, C=C, energy=energy) -> None:
                D = W - A @ B
                sums[name] = sums.get(name, 0.0) + float(((D @ C) * D).sum()) / energy

            for name, metric in (("projection", C), ("plain SVD", None)):
                A, B = start(W, metric, rank)
                note(name, A, B)
                for rounds in ROUNDS:
                    note(f"{name}, rounds {rounds}", *alternate(A, B, C, T, rounds=rounds, formed=torch.float32))
            A, B = start(W, C, rank)
            for bits in BITS:
                coarse = rounded(B, bits)
                note(f"B in {bits} bits", A, coarse)
                fitted, _ = alternate(A, coarse, C, T, rounds=1, formed=torch.float32)
                note(f"B in {bits} bits, A fitted", fitted, coarse)
    print("| start | relative error |\n|---|---|")
    for name, value in sums.items():
        print(f"| {name} | {value / len(linears):.3%} |")


if __name__ == "__main__":
    main()
