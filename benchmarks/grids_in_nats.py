"""Other grids of 2 and 3 bits in the whole model: excess nats on held-out text at equal stored bytes.

    python benchmarks/grids_in_nats.py MODEL --stats STATS --heldout heldout.txt --calibration calibration.txt

All linears of a model are rounded and multiplied as floats. `today` is the grid of the code (signed scales), `half` has
its levels at odd halves of a step, `rotated` turns the inputs by a random Hadamard matrix (`grids.turned`) and counts
nothing for it. Scales lie between two shares of the largest value of their group; of several for a grid in `RANGES`,
those count that lose least on `--tune` tokens of the calibration text with the first of the blocks rounded alone.
Without `--feedback` values are rounded to nearest. `--blocks 10:13` are rounded alone.
"""

import argparse
import math
from functools import partial
from typing import Any

import torch

from grids import Half, turned
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.evaluate import perplexity
from spectrim.maths import rounding
from spectrim.maths.rounding import DAMPING, Grid, Quantized, _by_waves, _spread, _triangular, fitting_group, quantize
from spectrim.metrics.metric import layer_metric
from spectrim.recipe import Recipe
from spectrim.samples import load_text

RANGES = {"today": ((1.1, 0.6),), "half": ((1.6, 1.1), (1.1, 0.6))}
RANGES |= {f"{kind}, rotated": ranges for kind, ranges in RANGES.items()}


def half_steps(
    W: torch.Tensor, grid: Half, C: torch.Tensor, G: torch.Tensor, ends: tuple[float, float], feedback: bool
) -> torch.Tensor:
    """W on a half-step grid; scales as the code chooses them, in one sign."""
    rows, _, S = _triangular(G, len(W), DAMPING, W)
    columns, weights, T = _triangular(C, W.shape[1], DAMPING, W)
    assert S is not None
    assert T is not None
    X = W.unflatten(1, (-1, grid.group or W.shape[1]))
    by_group = (weights if feedback else C.diagonal()).view(X.shape[1:])
    most = X.abs().amax(-1).clamp_min(1e-30)
    best, scale = torch.full_like(most, torch.inf), most.clone()
    for shrink in torch.linspace(*ends, 16).tolist():
        step = (most * shrink / (2**grid.bits - 1) * 2).bfloat16().double()[..., None]
        codes = grid.nearest(X, step, torch.tensor(0.5))
        cost = (((codes - 0.5) * step - X).square() * by_group).sum(-1)
        scale, best = torch.where(cost < best, step[..., 0], scale), torch.minimum(cost, best)
    step, offset = _spread(scale, None, W.shape[1])[0], torch.full_like(W, 0.5)
    if not feedback:
        return (grid.nearest(W, step, offset) - 0.5) * step
    Q, here = torch.empty_like(W), step[rows][:, columns]
    Q[rows[:, None], columns] = (_by_waves(W[rows][:, columns], here, offset, S, T, grid) - 0.5) * here
    return Q


def rounded(
    W: torch.Tensor, C: torch.Tensor, G: torch.Tensor, kind: str, bits: int, ends: tuple[float, float], feedback: bool
) -> torch.Tensor:
    """W on a grid of 2^bits levels, groups of 128 where they divide its inputs."""
    U = turned(W.shape[1]) if "rotated" in kind else None
    if U is not None:
        W, C = W @ U.T, U @ C @ U.T
    group = fitting_group(W.shape[1], 128)
    if "half" in kind:
        Q = half_steps(W, Half(bits, group), C, G, ends, feedback)
    elif feedback:
        rounding._FED = ends
        Q = quantize(W, Grid(bits, group), C, G, dtype=torch.bfloat16).dense()
    else:
        rounding._ALONE, grid = ends, Grid(bits, group)
        scale, _ = rounding.scales(W, grid, C.diagonal(), torch.bfloat16)
        step, zero = _spread(scale, None, W.shape[1])
        Q = Quantized(grid, grid.nearest(W, step, zero).to(torch.int8), scale).dense()
    return Q if U is None else Q @ U


@torch.no_grad()
def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--calibration", required=True, help="text by which ranges of scales are chosen")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=10240)
    parser.add_argument("--tune", type=int, default=2048)
    parser.add_argument("--bits", default="3,2")
    parser.add_argument("--kinds", default=";".join(RANGES))
    parser.add_argument("--blocks", default=":", help="the first, and the one after the last")
    parser.add_argument("--feedback", action="store_true")
    args = parser.parse_args()
    source = resolve(args.model)
    model, processor = load(source, dtype=torch.float32), load_processor(source)
    statistics, metric, parts = Statistics.open(args.stats), Recipe.read("spectrim").metric, anatomy(model)
    measured = partial(perplexity, model, getattr(processor, "tokenizer", processor), seqlen=args.window)
    first, last = (int(x) if x else None for x in args.blocks.split(":"))
    blocks: Any = parts.blocks()[first:last]
    texts = {"tune": (load_text(args.calibration, split="calibration"), args.tune)}
    texts["heldout"] = (load_text(args.heldout, split="heldout"), args.max_tokens)

    def nats(which: str) -> float:
        text, most = texts[which]
        return math.log(measured(text, max_tokens=most).per_token)

    dense = {which: nats(which) for which in texts}
    linears = {x: model.get_submodule(x.name).weight for x in parts.linears if x.block in blocks}
    kept = {linear: weight.clone() for linear, weight in linears.items()}

    def excess(kind: str, bits: int, ends: tuple[float, float], which: str) -> float:
        for linear, weight in linears.items():
            if which == "tune" and linear.block != blocks[0]:
                continue
            found = layer_metric(metric, linear, statistics)
            assert found.value is not None
            assert found.output is not None
            W = kept[linear].double()
            weight.copy_(rounded(W, found.value, found.output.dense(len(W)), kind, bits, ends, args.feedback))
        lost = nats(which) - dense[which]
        for linear, weight in linears.items():
            weight.copy_(kept[linear])
        return lost

    print("| bits | grid | range of scales | excess nats |\n|---|---|---|---|", flush=True)
    for bits in map(int, args.bits.split(",")):
        for kind in args.kinds.split(";"):
            some = RANGES[kind]
            tried = [excess(kind, bits, ends, "tune") for ends in some] if len(some) > 1 else [0.0]
            ends = some[tried.index(min(tried))]
            cells = f"{ends[0]} to {ends[1]} | {excess(kind, bits, ends, 'heldout'):.4f}"
            print(f"| {bits} | {kind} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
