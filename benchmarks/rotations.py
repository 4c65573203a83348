"""Rotated inputs in blocks of several sizes: rounding errors of single linears, × those of the same grid without.

    python benchmarks/rotations.py MODEL --stats STATS --linears layers.5.self_attn.q_proj,layers.5.mlp.down_proj

Every weight is rounded in the recipe's metrics with feedback on both sides, in groups of 128 where these divide the
inputs. A rotation is a Hadamard matrix of random signs, of so many neighbours; its bytes are the same.
"""

from datetime import UTC, datetime
from importlib.metadata import version

import torch

from rounding import named, of_linears
from spectrim.maths.rotation import hadamard
from spectrim.maths.rounding import Grid, error, fitting_group, quantize


def rotation(size: int, block: int) -> torch.Tensor:
    """Block-diagonal [size, size], of the largest power of two in `size` where that is less than `block`."""
    most = min(block, size & -size)
    signs = torch.randint(2, (most,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return torch.block_diag(*[hadamard(most) * signs] * (size // most))


def rounding_error(W: torch.Tensor, grid: Grid, C: torch.Tensor, G: torch.Tensor) -> float:
    """Of W rounded with feedback on both sides."""
    return error(W - quantize(W, grid, C, G, dtype=torch.bfloat16).dense(), C, G)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = of_linears(__doc__)
    parser.add_argument("--blocks", default="8,16,32,64")
    parser.add_argument("--bits", default="2,3,4,8")
    args = parser.parse_args()
    blocks, several = ([int(one) for one in some.split(",")] for some in (args.blocks, args.bits))
    print(f"| linear | {' | '.join(f'{bits} bits, blocks of {args.blocks}' for bits in several)} |")
    print("|---|" + "---|" * len(several))
    for name, W, C, output in named(args, "spectrim"):
        G, cells = output.dense(len(W)), []
        for bits in several:
            grid = Grid(bits, fitting_group(W.shape[1], 128))
            turned = [(W @ U.T, U @ C @ U.T) for U in (rotation(W.shape[1], block) for block in blocks)]
            plain, *lost = (rounding_error(X, grid, M, G) for X, M in ((W, C), *turned))
            cells.append(" / ".join(f"{one / plain:.2f}" for one in lost))
        print(f"| {name}, {len(W)} × {W.shape[1]} | {' | '.join(cells)} |", flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("spectrim", "torch", "transformers"))
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, {packages}")


if __name__ == "__main__":
    main()
