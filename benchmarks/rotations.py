"""Rotated inputs in blocks of several sizes: rounding errors of single linears, × those of the same grid without.

    python benchmarks/rotations.py MODEL --stats STATS --linears layers.5.self_attn.q_proj,layers.5.mlp.down_proj

Every weight is rounded in the recipe's metrics with feedback on both sides, in groups of 128 where these divide the
inputs. A rotation is a Hadamard matrix of random signs, of so many neighbours; its bytes are the same.
"""

import argparse
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics
from spectrim.checkpoint import load
from spectrim.demo import resolve
from spectrim.maths.rounding import Grid, error, fitting_group, quantize
from spectrim.metrics.metric import layer_metric
from spectrim.recipe import Recipe


def rotation(size: int, block: int) -> torch.Tensor:
    """Block-diagonal [size, size], of the largest power of two in `size` where that is less than `block`."""
    H, most = torch.ones(1, 1, dtype=torch.float64), min(block, size & -size)
    while len(H) < most:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)]) / 2**0.5
    signs = torch.randint(2, (len(H),), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return torch.block_diag(*[H * signs] * (size // len(H)))


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", required=True)
    parser.add_argument("--linears", required=True, help="ends of names, with commas")
    parser.add_argument("--blocks", default="8,16,32,64")
    parser.add_argument("--bits", default="2,3,4,8")
    args = parser.parse_args()
    model, statistics = load(resolve(args.model), dtype=torch.float32), Statistics.open(args.stats)
    blocks, metric = [int(block) for block in args.blocks.split(",")], Recipe.read("spectrim").metric
    several = [int(bits) for bits in args.bits.split(",")]
    print(f"| linear | {' | '.join(f'{bits} bits, blocks of {args.blocks}' for bits in several)} |")
    print("|---|" + "---|" * len(several))
    for linear in anatomy(model).linears:
        if not linear.name.endswith(tuple(args.linears.split(","))):
            continue
        W = model.get_submodule(linear.name).weight.detach().double()
        found = layer_metric(metric, linear, statistics)
        assert found.output is not None
        assert found.value is not None
        C, G, group = found.value, found.output.dense(len(W)), fitting_group(W.shape[1], 128)

        def lost(bits: int, U: torch.Tensor | None, W: torch.Tensor = W, C: torch.Tensor = C) -> float:
            W, C = (W, C) if U is None else (W @ U.T, U @ C @ U.T)
            made = quantize(W, Grid(bits, group), C, G, dtype=torch.bfloat16)  # noqa: B023 - called in this round alone
            return error(W - made.dense(), C, G)  # noqa: B023

        cells = []
        for bits in several:
            plain = lost(bits, None)
            cells.append(" / ".join(f"{lost(bits, rotation(W.shape[1], block)) / plain:.2f}" for block in blocks))
        print(f"| {linear.name}, {len(W)} × {W.shape[1]} | {' | '.join(cells)} |", flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("spectrim", "torch", "transformers"))
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, {packages}")


if __name__ == "__main__":
    main()
