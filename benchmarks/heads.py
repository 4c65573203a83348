"""The factors A of all heads in one padded product, against one product for each head, over rows of inputs.

    python benchmarks/heads.py                        # bfloat16, one thread: microseconds of both, and the ratio

From it comes `spectrim.kernels.heads.ROWS`. Both sides run in turn; the least of several times counts.
"""

import argparse
import timeit
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from spectrim.kernels.heads import by_head, columns, heads_together


def apart(latent: torch.Tensor, factors: Sequence[nn.Linear]) -> torch.Tensor:
    """What a layer by head computes without it."""
    parts = latent.split([factor.in_features for factor in factors], dim=-1)
    return torch.cat([A(part) for A, part in zip(factors, parts, strict=True)], dim=-1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rows", default="1,4,8,16,32,64,256")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    print(f"torch {torch.__version__}, {args.dtype}, seed 0, {device.type}\n")
    print("| heads | outputs | rows | each, µs | together, µs | ratio |\n|---|---|---|---|---|---|")
    for heads, out in ((28, 128), (8, 64), (4, 128)):
        ranks = [int(rank) for rank in torch.randint(out // 4, out // 2, (heads,))]
        factors = [nn.Linear(rank, out, bias=False, dtype=dtype, device=device) for rank in ranks]
        with torch.no_grad():
            together, places = heads_together([factor.weight for factor in factors]), columns(ranks, device)
            for rows in map(int, args.rows.split(",")):
                latent = torch.randn(rows, sum(ranks), dtype=dtype, device=device)

                each, one = partial(apart, latent, factors), partial(by_head, latent, together, places)
                torch.testing.assert_close(one(), each())
                times = [1e6 * min(timeit.repeat(run, number=50, repeat=5)) / 50 for run in (each, one)]
                print(f"| {heads} | {out} | {rows} | {times[0]:.0f} | {times[1]:.0f} | {times[0] / times[1]:.2f} |")


if __name__ == "__main__":
    main()
