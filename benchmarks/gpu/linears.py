"""Linears of a 7B model on a GPU, dense against factors and integers: µs, ratios, and share of the memory bandwidth.

    python benchmarks/gpu/linears.py [--json OUT]      # H100 or H200, under 4 minutes
    python benchmarks/gpu/linears.py --small           # on the CPU, to see that it runs

bfloat16, CUDA graphs, weights rotated beyond the cache; then one decode step of 28 layers, without embedding and output
head, against 1024 tokens in the cache. The first product of each kind of integers compiles a kernel of humming-kernels;
what does not fit into `--limit` seconds is left out, and that is said.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from model import SEVEN, SMALL, Attend, Layer, Make, Shape, chain
from timing import BANDWIDTH, ROTATED, Clock, asked, nbytes, rotated, table, verdict
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from spectrim.maths.rounding import Grid
from spectrim.storage.layers import LowRankLinear
from spectrim.storage.packed import PackedLinear

ROWS = (1, 8, 64)


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


def attention(shape: Shape, context: int, like: dict) -> Attend:
    """Over so many cached tokens, by torch; the new token's keys and values take the place of the last."""
    keys, values = torch.randn(2, 1, shape.shared, context, shape.head, **like)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys[:, :, -1], values[:, :, -1] = (part.view(1, shape.shared, shape.head) for part in (k, v))
        q = q.view(1, shape.heads, 1, shape.head)
        return scaled_dot_product_attention(q, keys, values, enable_gqa=True).reshape(1, -1)

    return attend


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


def step(clock: Clock, make: Make, context: int, shape: Shape, like: dict) -> tuple[float, int]:
    """Seconds of a decode step, and bytes of its linears."""
    layers = [Layer(shape, make, attention(shape, context, like)) for _ in range(shape.layers)]
    x = torch.randn(1, shape.width, **like)
    return clock.seconds(lambda: chain(layers, x)), sum(map(nbytes, layers))


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    options, elapsed = asked(__doc__, "small shapes on the CPU", arguments)
    clock = Clock.here(options.small)
    like = {"device": clock.device, "dtype": torch.bfloat16}
    model, multiple = (SMALL, 16) if options.small else (SEVEN, 128)
    width, inner, shared = model.width, model.inner, model.shared * model.head

    def late() -> bool:
        return elapsed() > options.limit

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
        found[form] = step(clock, make, 64 if options.small else 1024, model, like)
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
    print(f"\nA decode step of {model.layers} layers:\n")
    cells = [[form, f"{n / most:.1%}", f"{1e3 * s:.3f}", f"{base / s:.2f}"] for form, (s, n) in found.items()]
    print(table(["linears", "of the bytes", "ms", "× dense"], cells))

    def ratio(form: str) -> float | None:
        return next((r.ratio for r in rows if r.form == form and r.rows == 1), None)

    fast = [base / found[form][0] for form in ("int3", "factors 20 %") if form in found and "dense" in found]
    print(f"\n{verdict(f'factors at 40 % of {inner} × {width}', ratio('factors 40 %'), 2)}")
    print(verdict(f"4 bits at {inner} × {width}", ratio("int4"), 2.5))
    print(verdict("the step at 20 % of the bytes, in its faster form,", max(fast, default=None), 3))
    print(f"{elapsed():.0f} seconds")
    if options.json:
        steps_found = {form: {"seconds": s, "bytes": n} for form, (s, n) in found.items()}
        record = {"device": clock.name, "linears": [asdict(row) for row in rows], "steps": steps_found}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
