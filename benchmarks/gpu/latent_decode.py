"""Attention over latents on a GPU, against whole keys and values, and against rebuilding them first.

    python benchmarks/gpu/latent_decode.py [--tune] [--json OUT]      # H100 or H200, under 4 minutes
    python benchmarks/gpu/latent_decode.py --small           # in Triton's interpreter, to see that it runs

One layer of 28 heads on 4, 128 numbers each, bfloat16, CUDA graphs; then tokens per second of a model of Qwen2-7B
over lengths of context. `full` is a split decode of the same tiling over whole keys and values, `sdpa` torch's, and
`rebuilt` makes keys and values of the latents, rotates the keys in one pass, and runs the faster of these two. Every
result is compared with the reference in float64. What does not fit into `--limit` seconds is left out and named.
With `--tune`, other ways to cut the work are tried as well, which takes a minute more.
"""

import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from full_width import full_decode
from model import SEVEN, SMALL, Attend, Layer, Shape, chain
from timing import BANDWIDTH, Clock, asked, table, verdict
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from spectrim.kernels import latent_decode as reference
from spectrim.kernels.latent_decode_triton import Factors, Tiles, decode

ERROR = 0.02  # of a result in bfloat16, relative


@dataclass(frozen=True)
class Row:
    """One way at one shape; `limit_us` is the time that the bytes of its cache take at 3.0 TB/s."""

    batch: int
    tokens: int
    way: str
    rank: int
    us: float
    limit_us: float
    error: float


class Problem:
    """Latents of one layer with one rank for all heads, and what other ways keep in their place."""

    def __init__(self, shape: Shape, batch: int, tokens: int, rank: int, like: dict) -> None:
        self.shape, self.rank, self.scaling = shape, rank, shape.head**-0.5
        self.q = torch.randn(batch, shape.heads, shape.head, **like)
        self.z_k, self.z_v = (torch.randn(batch, tokens, shape.shared * rank, **like) for _ in range(2))
        self.A_k, self.A_v = (
            [torch.randn(shape.head, rank, **like) * rank**-0.5 for _ in range(shape.shared)] for _ in range(2)
        )
        self.factors = Factors.of(self.A_k, self.A_v)
        pairs = torch.arange(0, shape.head, 2, device=like["device"]) / shape.head
        angles = torch.arange(tokens, device=like["device"])[:, None] * 1e6**-pairs
        angles = torch.cat([angles, angles], dim=1)[None]
        self.cos, self.sin = angles.cos().to(like["dtype"]), angles.sin().to(like["dtype"])

    def latent(self, tiles: Tiles | None = None) -> torch.Tensor:
        """Our kernel."""
        tables = {"cos": self.cos, "sin": self.sin}
        return decode(self.q, self.z_k, self.z_v, self.factors, scaling=self.scaling, tiles=tiles, **tables)

    def whole(self, turn: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys, and values, [B, H, T, D]."""
        found = []
        for z, factors in ((self.z_k, self.A_k), (self.z_v, self.A_v)):
            heads = z.unflatten(2, (self.shape.shared, self.rank)).transpose(1, 2)
            found.append(torch.matmul(heads, torch.stack([A.T for A in factors])))
        return turn(found[0], self.cos, self.sin), found[1]

    def error(self, found: torch.Tensor, count: int = 2) -> float:
        """Relative to the reference in float64, of the first sequences."""
        wide = [x[:count].double() for x in (self.q, self.z_k, self.z_v)]
        factors = [[A.double() for A in side] for side in (self.A_k, self.A_v)]
        tables = {"cos": self.cos.double(), "sin": self.sin.double()}
        truth = reference.latent_decode(*wide, *factors, scaling=self.scaling, **tables)
        return float((found[:count].double() - truth).norm() / truth.norm())


def turned(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat([-high, low], dim=-1) * sin


def sdpa(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    y = scaled_dot_product_attention(q[:, :, None], keys, values, scale=scaling, enable_gqa=True)
    return y[:, :, 0]


def cuts(base: Tiles) -> list[Tiles]:
    """Other ways to cut the work than `base`."""
    found = [
        replace(base, tile=tile, chunk=chunk, heads=heads, warps=warps, stages=stages)
        for tile, warps in ((32, 4), (64, 4), (64, 8), (128, 8))
        for chunk, heads, stages in itertools.product((32, 64), (1, 4), (2, 3))
    ]
    return [tiles for tiles in found if tiles != base]


def proved(job: tuple[Tiles, int]) -> float | str:
    """The error of some tiles at a rank, or how they failed; run in a process that may come to harm."""
    tiles, rank = job
    try:
        with torch.inference_mode():
            problem = Problem(SEVEN, 4, 4096, rank, {"device": "cuda", "dtype": torch.bfloat16})
            return max(problem.error(problem.latent(replace(tiles, split=512))) for _ in range(3))
    except Exception as failed:
        return f"{type(failed).__name__}: {failed}".splitlines()[0]


def sound(base: Tiles, rank: int) -> list[Tiles]:
    """The cuts that are right at a rank. Each has its own process: after an access outside its memory none goes on."""
    tried = cuts(base)
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(8, mp_context=spawned, max_tasks_per_child=1) as pool:
        found = dict(zip(tried, pool.map(proved, [(tiles, rank) for tiles in tried]), strict=True))
    for tiles, error in found.items():
        if isinstance(error, str) or not error < ERROR:
            print(f"rank {rank}: {tiles} is wrong: {error}")
    return [tiles for tiles, error in found.items() if not isinstance(error, str) and error < ERROR]


def tuned(clock: Clock, problem: Problem, others: Sequence[Tiles]) -> tuple[Tiles, float]:
    """The fastest of some ways to cut the work, with its seconds."""
    batch, tokens = problem.z_k.shape[:2]
    times: list[tuple[Tiles, float]] = []
    for tiles in others:
        programs = batch * (problem.shape.shared // tiles.heads)
        for waves in (1, 2, 4):
            split = -(-tokens * programs // (waves * clock.processors * tiles.tile)) * tiles.tile
            cut = replace(tiles, split=min(max(split, tiles.tile), 4096))
            times.append((cut, clock.seconds(partial(problem.latent, cut))))
    return min(times, key=lambda pair: pair[1])


def whole_cache(shape: Shape, batch: int, tokens: int, like: dict, processors: int) -> Attend:
    """Attention of one layer of the model; what is new takes the place of the last token."""
    keys, values = torch.randn(2, batch, shape.shared, tokens, shape.head, **like)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys[:, :, -1], values[:, :, -1] = (x.view(batch, shape.shared, shape.head) for x in (k, v))
        queries = q.view(batch, shape.heads, shape.head)
        return full_decode(queries, keys, values, shape.head**-0.5, processors).flatten(1)

    return attend


def latent_cache(shape: Shape, batch: int, tokens: int, rank: int, like: dict) -> Attend:
    """The same over latents."""
    problem = Problem(shape, batch, tokens, rank, like)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        problem.z_k[:, -1], problem.z_v[:, -1] = k, v
        problem.q = q.view(batch, shape.heads, shape.head)
        return problem.latent().flatten(1)

    return attend


def tokens_per_second(
    clock: Clock, shape: Shape, batch: int, rank: int, contexts: Sequence[int], like: dict, late: Callable[[], bool]
) -> list[dict[str, float]]:
    """Of a whole model by length of context, its linears dense but for those that make latents."""

    def make(out: int, size: int) -> nn.Module:
        return nn.Linear(size, out, bias=False, **like).requires_grad_(False)

    def layers(kept: int | None) -> list[Layer]:
        return [Layer(shape, make, lambda q, k, v: q, kept) for _ in range(shape.layers)]

    if late():
        print("out of time: the model is left out")
        return []
    caches = {
        "full": partial(whole_cache, shape, batch, like=like, processors=clock.processors),
        "latents": partial(latent_cache, shape, batch, rank=rank, like=like),
    }
    models = {"full": layers(None), "latents": layers(shape.shared * rank)}
    x, found = torch.randn(batch, shape.width, **like), []
    for tokens in contexts:
        if late():
            print(f"out of time: the model at {tokens} tokens is left out")
            continue
        row: dict[str, float] = {"tokens": tokens}
        for way, model in models.items():
            for layer in model:
                layer.attend = caches[way](tokens=tokens)
            row[way] = batch / clock.seconds(partial(chain, model, x))
            for layer in model:  # the caches of one length make room for those of the next
                layer.attend = lambda q, k, v: q
        found.append(row)
    return found


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    options, elapsed = asked(
        __doc__, "small shapes in Triton's interpreter", arguments, tune="try other ways to cut the work, too"
    )
    clock, shape = Clock.here(options.small), SMALL if options.small else SEVEN
    like = {"device": clock.device, "dtype": torch.float16 if options.small else torch.bfloat16}
    turn = turned if options.small else torch.compile(turned)
    print(f"{clock.name}, torch {torch.__version__}\n")

    def late() -> bool:
        return elapsed() > options.limit

    rows: list[Row] = []
    others: dict[int, list[Tiles]] = {}
    for batch, tokens in ((1, 96), (2, 64)) if options.small else ((32, 8192), (8, 8192), (1, 32768)):
        for rank in (32, 48) if options.small else (48, 32, 64):
            if late():
                print(f"out of time: {batch} × {tokens}, rank {rank} is left out")
                continue
            problem = Problem(shape, batch, tokens, rank, like)
            keys, values = problem.whole(turn)

            def add(way: str, run: Callable[[], torch.Tensor], numbers: int, problem: Problem = problem) -> float:
                q, z = problem.q, problem.z_k
                limit = 1e6 * 2 * len(q) * z.shape[1] * shape.shared * numbers * z.element_size() / BANDWIDTH
                us = 1e6 * clock.seconds(run)
                rows.append(Row(len(q), z.shape[1], way, problem.rank, us, limit, problem.error(run())))
                return us

            add("latents", problem.latent, rank)
            block = max(problem.factors.blocks)
            if clock.device.type == "cuda" and options.tune:
                if block not in others:
                    base = Tiles.fitting(batch, tokens, shape.shared, block, shape.head // 2, False, clock.processors)
                    others[block] = sound(base, rank)
                best, seconds = tuned(clock, problem, others[block])
                print(f"{batch} × {tokens}, rank {rank}: {1e6 * seconds:.1f} µs with {best}")
                add("latents, tuned", partial(problem.latent, best), rank)
            ways = {
                "full": partial(full_decode, scaling=problem.scaling, processors=clock.processors),
                "sdpa": partial(sdpa, scaling=problem.scaling),
            }
            taken = {way: add(way, partial(run, problem.q, keys, values), shape.head) for way, run in ways.items()}
            attend = ways[min(taken, key=taken.__getitem__)]
            add("rebuilt", lambda attend=attend, problem=problem: attend(problem.q, *problem.whole(turn)), rank)
            del problem, keys, values

    rank, batch = (32, 2) if options.small else (48, 8)
    contexts = (32, 64) if options.small else [1024 << n for n in range(7)]
    speeds = tokens_per_second(clock, shape, batch, rank, contexts, like, late)

    cells = [
        [f"{r.batch} × {r.tokens}", str(r.rank), r.way, f"{r.us:.1f}", f"{r.limit_us / r.us:.0%}", f"{r.error:.1e}"]
        for r in rows
    ]
    print("\n" + table(["batch × tokens", "rank", "way", "µs", "of 3.0 TB/s", "error"], cells))
    print(f"\nTokens per second of a model of {shape.layers} layers, {batch} sequences, rank {rank}:\n")
    cells = [
        [str(s["tokens"]), *(f"{s[w]:.0f}" for w in ("full", "latents")), f"{s['latents'] / s['full']:.2f}"]
        for s in speeds
    ]
    print(table(["context", "full", "latents", "×"], cells) + "\n")
    for batch, tokens, rank in dict.fromkeys((r.batch, r.tokens, r.rank) for r in rows):
        us = {r.way: r.us for r in rows if (r.batch, r.tokens, r.rank) == (batch, tokens, rank)}
        name = f"{batch} × {tokens}, rank {rank}:"
        if rank <= 48:
            print(verdict(f"{name} latents over rebuilt", us["rebuilt"] / us["latents"], 2.3))
            print(verdict(f"{name} latents over whole keys and values", min(us["full"], us["sdpa"]) / us["latents"], 1))
    worst = max((r.error for r in rows), default=0.0)
    print(f"{'PASS' if worst < ERROR else 'FAIL'}: the largest error is {worst:.1e}, at most {ERROR}")
    print(f"{elapsed():.0f} seconds")
    if options.json:
        record = {"device": clock.name, "layer": [asdict(row) for row in rows], "model": speeds}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
