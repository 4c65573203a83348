"""Linears of a 7B model on a GPU, dense against factors and integers: µs, ratios, and share of the memory bandwidth.

    python benchmarks/gpu/linears.py [--json OUT]      # H100 or H200, under 4 minutes
    python benchmarks/gpu/linears.py --small           # on the CPU, to see that it runs

bfloat16, CUDA graphs, weights rotated beyond the cache; then one decode step of 28 layers, without embedding and output
head, against 1024 tokens in the cache. The first product of each kind of integers compiles a kernel of humming-kernels;
what does not fit into `--limit` seconds is left out, and that is said.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from timing import BANDWIDTH, ROTATED, Clock, nbytes, rotated, table, verdict
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from spectrim.maths.rounding import Grid
from spectrim.storage.layers import LowRankLinear
from spectrim.storage.packed import PackedLinear

WIDTH, HEADS, SHARED, HEAD, INNER, LAYERS = 3584, 28, 4, 128, 18944, 28
ROWS = (1, 8, 64)
Make = Callable[[int, int], nn.Module]  # of outputs and inputs


@dataclass(frozen=True)
class Row:
    """One layer at one number of rows of inputs; `limit_us` is the time that its bytes take at 3.0 TB/s."""

    out: int
    size: int
    rows: int
    form: str
    us: float
    ratio: float
    limit_us: float


def dense(out: int, size: int, like: dict) -> nn.Module:
    return nn.Linear(size, out, bias=False, **like).requires_grad_(False)


def factors(out: int, size: int, like: dict, share: float, multiple: int = 128) -> nn.Module:
    """Two factors of so many of the dense bytes, of the nearest rank in steps of `multiple`."""
    rank = max(1, round(share * out * size / (out + size) / multiple)) * multiple
    layer = LowRankLinear(size, out, min(rank, out, size), bias=False, **like).requires_grad_(False)
    for factor in layer.parameters():
        nn.init.normal_(factor, std=factor.shape[1] ** -0.5)
    return layer


def integers(out: int, size: int, like: dict, bits: int) -> nn.Module:
    """Random codes, symmetric, in groups of 128."""
    layer = PackedLinear(size, out, Grid(bits, 128), bias=False, **like)
    layer.weight_packed.random_(-(1 << 31), (1 << 31) - 1)
    layer.weight_scale.fill_(size**-0.5 / (1 << bits - 1))
    layer.run_as("auto")
    return layer


def forms(like: dict, multiple: int) -> dict[str, Make]:
    made = {"dense": partial(dense, like=like)}
    made["factors 40 %"] = partial(factors, like=like, share=0.4, multiple=multiple)
    for bits in (4, 3, 2):
        made[f"int{bits}"] = partial(integers, like=like, bits=bits)
    return made


class Block(nn.Module):
    """A decoder layer of Qwen2's shape for one new token, its keys and values in a cache of fixed length."""

    def __init__(self, make: Make, context: int, width: int, inner: int, like: dict) -> None:
        super().__init__()
        self.head, self.groups = (HEAD, SHARED) if width == WIDTH else (width // 4, 2)
        shared = self.groups * self.head
        self.q, self.o = make(width, width), make(width, width)
        self.k, self.v = make(shared, width), make(shared, width)
        self.gate, self.up, self.down = make(inner, width), make(inner, width), make(width, inner)
        self.register_buffer("cache", torch.randn(2, 1, self.groups, context, self.head, **like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One token, [1, width]."""
        h = rms_norm(x, x.shape[-1:])
        q, k, v = (part(h).view(1, -1, 1, self.head) for part in (self.q, self.k, self.v))
        self.cache[0, :, :, -1:], self.cache[1, :, :, -1:] = k, v
        attended = scaled_dot_product_attention(q, self.cache[0], self.cache[1], enable_gqa=True)
        x = x + self.o(attended.reshape(1, -1))
        h = rms_norm(x, x.shape[-1:])
        return x + self.down(silu(self.gate(h)) * self.up(h))


def measure(clock: Clock, shape: tuple[int, int], made: dict[str, Make], like: dict, late: Callable[[], bool]):
    """Rows of one shape; forms that run out of time are left out."""
    out, size = shape
    base: dict[int, float] = {}
    for form, make in made.items():
        if late():
            print(f"out of time: {out} × {size} {form} is left out")
            continue
        layers = rotated(make(out, size), 1e5 if clock.device.type == "cpu" else ROTATED)
        read = nbytes(layers[0])
        for rows in ROWS:
            x = torch.randn(rows, size, **like)
            us = 1e6 * clock.seconds(lambda layers=layers, x=x: [layer(x) for layer in layers]) / len(layers)
            base.setdefault(rows, us)
            limit = 1e6 * (read + 2 * rows * (out + size)) / BANDWIDTH
            yield Row(out, size, rows, form, us, base[rows] / us, limit)


def step(clock: Clock, make: Make, context: int, sizes: tuple[int, int, int], like: dict) -> tuple[float, int]:
    """Seconds of a decode step, and bytes of its linears."""
    width, inner, count = sizes
    blocks = [Block(make, context, width, inner, like) for _ in range(count)]

    def run() -> torch.Tensor:
        x = start
        for block in blocks:
            x = block(x)
        return x

    start = torch.randn(1, width, **like)
    return clock.seconds(run), sum(nbytes(block) - block.cache.nbytes for block in blocks)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    parser.add_argument("--limit", type=float, default=225, help="seconds after which nothing new begins")
    options = parser.parse_args(arguments)
    clock = Clock.here(options.small)
    like = {"device": clock.device, "dtype": torch.bfloat16}
    width, shared, inner, count, multiple = (
        (256, 128, 512, 2, 16) if options.small else (WIDTH, 512, INNER, LAYERS, 128)
    )

    def late(more: float = 0) -> bool:
        return time.monotonic() - began + more > options.limit

    made = forms(like, multiple)
    print(f"{clock.name}, torch {torch.__version__}\n")
    steps = {"dense": made["dense"], "int3": made["int3"]}
    steps["factors 20 %"] = partial(factors, like=like, share=0.2, multiple=multiple)
    shapes = [(inner, width), (width, inner), (width, width), (shared, width), (width, shared)]
    # The largest shape and the whole step come first: they decide.
    rows = list(measure(clock, shapes[0], made, like, late))
    found: dict[str, tuple[float, int]] = {}
    for form, make in steps.items():
        if late():
            print(f"out of time: the step of {form} is left out")
            continue
        found[form] = step(clock, make, 64 if options.small else 1024, (width, inner, count), like)
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
    for shape in shapes[1:]:
        rows += measure(clock, shape, made, like, late)

    cells = [
        [f"{r.out} × {r.size}", str(r.rows), r.form, f"{r.us:.1f}", f"{r.ratio:.2f}", f"{r.limit_us / r.us:.0%}"]
        for r in rows
    ]
    print(table(["weight", "rows", "form", "µs", "× dense", "of 3.0 TB/s"], cells))
    base, most = found.get("dense", (0.0, 1))
    print(f"\nA decode step of {count} layers:\n")
    cells = [[form, f"{n / most:.1%}", f"{1e3 * s:.3f}", f"{base / s:.2f}"] for form, (s, n) in found.items()]
    print(table(["linears", "of the bytes", "ms", "× dense"], cells))

    def ratio(form: str) -> float | None:
        return next((r.ratio for r in rows if r.form == form and r.rows == 1), None)

    fast = [base / found[form][0] for form in ("int3", "factors 20 %") if form in found and "dense" in found]
    print(f"\n{verdict(f'factors at 40 % of {inner} × {width}', ratio('factors 40 %'), 2)}")
    print(verdict(f"4 bits at {inner} × {width}", ratio("int4"), 2.5))
    print(verdict("the step at 20 % of the bytes, in its faster form,", max(fast, default=None), 3))
    print(f"{time.monotonic() - began:.0f} seconds")
    if options.json:
        steps_found = {form: {"seconds": s, "bytes": n} for form, (s, n) in found.items()}
        record = {"device": clock.name, "linears": [asdict(row) for row in rows], "steps": steps_found}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
