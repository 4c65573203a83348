"""Rounding errors of single linears: to nearest, with feedback along the inputs or on both sides, and predicted.

    python benchmarks/rounding.py smollm2.gguf --stats STATS --linears layers.5.self_attn.q_proj,layers.5.mlp.down_proj

Predicted losses in nats of each linear alone, as dense integers and as integer factors of one rank, with and without
the re-fit of A. The statistics need curvature.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics
from spectrim.checkpoint import load
from spectrim.demo import resolve
from spectrim.maths.closed_form import gram, refit
from spectrim.maths.decompose import OutputMetric, decompose, sides
from spectrim.maths.rounding import Grid, conditional, error, expected, fitting_group, quantize
from spectrim.metrics.metric import layer_metric
from spectrim.recipe import Recipe


def of_linears(description: str | None) -> argparse.ArgumentParser:
    """A command line that names a model, statistics of it, and some of its linears."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", required=True)
    parser.add_argument("--linears", required=True, help="ends of names, with commas")
    return parser


def named(args: argparse.Namespace, recipe: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, OutputMetric]]:
    """Name, weight [out, in] float64, input metric [in, in] and output metric of each of these linears."""
    model, statistics = load(resolve(args.model), dtype=torch.float32), Statistics.open(args.stats)
    for linear in anatomy(model).linears:
        if linear.name.endswith(tuple(args.linears.split(","))):
            metric = layer_metric(Recipe.read(recipe).metric, linear, statistics)
            assert metric.output is not None
            assert metric.value is not None
            yield linear.name, model.get_submodule(linear.name).weight.detach().double(), metric.value, metric.output


def main() -> None:
    """Parse the command line, measure and print."""
    parser = of_linears(__doc__)
    parser.add_argument("--bits", default="3,4")
    parser.add_argument("--rank", type=int, default=192)
    parser.add_argument("--groups", default="128", help="inputs that share a scale, with commas; none for all")
    parser.add_argument("--zero-points", action="store_true", help="asymmetric grids")
    args = parser.parse_args()
    head = "linear | bits | stored | to nearest | inputs | both sides | predicted | rank | truncated | nearest | fed on"
    print(f"| {head} | re-fit |\n{'|---' * 12}|")
    for name, W, C, output in named(args, "curvature"):
        G, spectrum = output.dense(len(W)), decompose(W, C, output)
        A, B = (factor.double() for factor in sides(W, *spectrum.directions(args.rank)[1:]))
        for bits, group in product(map(int, args.bits.split(",")), args.groups.split(",")):
            wanted = None if group == "none" else int(group)
            grid, narrow = (Grid(bits, fitting_group(n, wanted), not args.zero_points) for n in (W.shape[1], args.rank))
            rounded = partial(quantize, dtype=torch.bfloat16)
            found = [error(W - rounded(W, grid, *given).dense(), C, G) for given in ((), (C,), (C, G))]
            weights = conditional(C, W.shape[1], W), conditional(G, len(W), W)
            found += [float(expected(W, grid, *weights, torch.bfloat16).sum())]
            cells = [f"{8 * grid.nbytes(*W.shape, torch.bfloat16.itemsize) / W.numel():.2f}"]
            cells += [f"{value:.5f}" for value in found] + [str(args.rank), f"{error(W - A @ B, C, G):.5f}"]
            plain = rounded(A, narrow).dense() @ rounded(B, grid).dense()
            kept = rounded(B, grid, C).dense()
            again = [rounded(X, narrow, gram(kept, C), G).dense() @ kept for X in (A, refit(W, A, kept, C))]
            cells += [f"{error(W - approximation, C, G):.5f}" for approximation in (plain, *again)]
            print(f"| {name} | {bits} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
