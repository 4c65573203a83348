"""Decomposition of one linear under a second moment: the projection of spectrim against the textbook route.

    python benchmarks/decomposition_speed.py [--models smollm2,qwen2.5-vl-3b,qwen2.5-vl-7b] [--scale N] [--json OUT]

Both start from a weight W [out, in] and a second moment C [in, in] and end with two factors at 60 % retention, in
float64. The textbook route (SVD-LLM): Cholesky S of C, thin SVD of W S, factors U Σ^½ and Σ^½ Vᵀ S⁻¹ by the
triangular inverse. Both errors are tr((W − AB) C (W − AB)ᵀ) over tr(W C Wᵀ). Weights are Gaussian; moments have a
decaying low-rank part on a positive diagonal, so that the Cholesky factor exists. Every distinct shape is timed once
on its own, also where linears of a model share an input, because a pipeline decomposes each on its own; models
count it as often as they have it. The smallest shape of each model is also run with a moment of fewer samples than
inputs.

With --json, every finished shape is written at once, and a run that finds it there does not repeat it. The largest
shape needs about 12 GB.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spectrim.maths.decompose import decompose, factors

RETAIN = 0.6
REPEAT_BELOW = 5.0  # seconds: shorter runs are taken three times, and the fastest counts

# (out, in, count). The Qwen2.5-VL towers are equal but for the width that the merger ends in.
TOWER = [(3840, 1280, 32), (1280, 1280, 32), (3420, 1280, 64), (1280, 3420, 32), (5120, 5120, 1)]
MODELS = {
    "smollm2": [(576, 576, 60), (192, 576, 60), (1536, 576, 60), (576, 1536, 30)],
    "qwen2.5-vl-3b": [
        *TOWER, (2048, 5120, 1), (2048, 2048, 72), (256, 2048, 72), (11008, 2048, 72), (2048, 11008, 36),
    ],
    "qwen2.5-vl-7b": [
        *TOWER, (3584, 5120, 1), (3584, 3584, 56), (512, 3584, 56), (18944, 3584, 56), (3584, 18944, 28),
    ],
}  # fmt: skip

Factors = tuple[torch.Tensor, torch.Tensor]


def textbook(W: torch.Tensor, C: torch.Tensor, rank: int) -> Factors:
    S = torch.linalg.cholesky(C)
    U, sigma, Vh = torch.linalg.svd(W @ S, full_matrices=False)
    half = sigma[:rank].sqrt()
    inverse = torch.linalg.solve_triangular(S, torch.eye(len(S), dtype=S.dtype), upper=False)
    return U[:, :rank] * half, (half[:, None] * Vh[:rank]) @ inverse


def projection(W: torch.Tensor, C: torch.Tensor, rank: int) -> Factors:
    found = decompose(W, C)
    return factors(W, found.s[:rank], found.P[:, :rank], None if found.Q is None else found.Q[:, :rank])


def problem(out: int, size: int, *, deficient: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [out, in] and second moment [in, in], the same in every run."""
    generator = torch.Generator().manual_seed(out * 100_003 + size)
    W = torch.randn(out, size, generator=generator, dtype=torch.float64) / size**0.5
    samples = size // 4 if deficient else min(size, 256)
    X = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    C = X.T @ ((1 / torch.arange(1, samples + 1, dtype=torch.float64))[:, None] * X)
    if not deficient:
        C.diagonal().add_(torch.rand(size, generator=generator, dtype=torch.float64) + 0.1)
    return W, C


def error(W: torch.Tensor, C: torch.Tensor, found: Factors) -> float:
    """Relative error under C."""
    D = W - found[0] @ found[1]
    return float(((D @ C) * D).sum() / ((W @ C) * W).sum())


def timed(route: Callable[..., Factors], W: torch.Tensor, C: torch.Tensor, rank: int) -> tuple[float, Factors]:
    seconds = []
    while not seconds or (len(seconds) < 3 and seconds[0] < REPEAT_BELOW):
        started = time.perf_counter()
        found = route(W, C, rank)
        seconds.append(time.perf_counter() - started)
    return min(seconds), found


def kept_rank(out: int, size: int) -> int:
    return max(1, int(RETAIN * out * size / (out + size)))


def measure(out: int, size: int) -> dict[str, Any]:
    """Both routes on one shape, one after the other."""
    (W, C), rank = problem(out, size), kept_rank(out, size)
    row: dict[str, Any] = {"out": out, "in": size, "rank": rank}
    for name, route in (("projection", projection), ("textbook", textbook)):
        seconds, found = timed(route, W, C, rank)
        row[name] = {"seconds": seconds, "error": error(W, C, found)}
        del found
    return row


def measure_deficient(out: int, size: int) -> dict[str, Any]:
    """What each route makes of a moment of a quarter as many samples as inputs."""
    (W, C), rank = problem(out, size, deficient=True), kept_rank(out, size)
    row: dict[str, Any] = {"out": out, "in": size, "rank": rank, "samples": size // 4}
    for name, route in (("projection", projection), ("textbook", textbook)):
        try:
            row[name] = f"error {error(W, C, route(W, C, rank)):.3e}"
        except torch.linalg.LinAlgError as failure:
            row[name] = f"fails: {str(failure).split('(')[0].removeprefix('linalg.').strip(' :.')}"
    return row


class Results:
    """Rows by key, written to the file after each one."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            content = json.loads(path.read_text())
            if content["settings"] != settings:
                raise SystemExit(f"{path} was measured with {content['settings']}, not {settings}; name another file")
            self.rows = content["rows"]

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a key, made and written first if there is none."""
        if key not in self.rows:
            self.rows[key] = make()
            self.write({})
        return self.rows[key]

    def write(self, totals: dict[str, Any]) -> None:
        """Replace the file, if there is one; the totals by model come at the end."""
        if self.path is None:
            return
        temporary = self.path.with_suffix(".tmp")
        content = {"settings": self.settings, "rows": self.rows, "models": totals}
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self.path)


def report(model: str, shapes: list[tuple[int, int, int]], results: Results) -> dict[str, float]:
    """Measure and print one model; seconds of both routes over all its linears, and their ratio."""
    print(f"\n{model}\n{'out':>6} {'in':>6} {'rank':>5} {'count':>5} {'projection':>11} {'textbook':>11} {'ratio':>7}"
          f"  {'error, projection':>18} {'textbook':>12}")  # fmt: skip
    totals = {"projection": 0.0, "textbook": 0.0}
    for out, size, count in shapes:
        row = results.get(f"{out}x{size}", lambda out=out, size=size: measure(out, size))
        ours, theirs = row["projection"], row["textbook"]
        for name in totals:
            totals[name] += count * row[name]["seconds"]
        print(
            f"{out:6d} {size:6d} {row['rank']:5d} {count:5d} {ours['seconds']:9.3f} s {theirs['seconds']:9.3f} s "
            f"{theirs['seconds'] / ours['seconds']:6.2f}×  {ours['error']:18.12f} {theirs['error']:12.10f}",
            flush=True,
        )
    ratio = totals["textbook"] / totals["projection"]
    print(f"all linears: {totals['projection']:.1f} s against {totals['textbook']:.1f} s, {ratio:.2f}× as fast")
    out, size, _ = min(shapes, key=lambda shape: shape[0] * shape[1])
    row = results.get(f"{out}x{size} rank-deficient", lambda: measure_deficient(out, size))
    print(f"{out} × {size}, moment of {row['samples']} samples: projection {row['projection']}; "
          f"textbook {row['textbook']}")  # fmt: skip
    return {**totals, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: all)")
    parser.add_argument("--scale", type=int, default=1, help="divide all widths, for a quick look (default 1)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, help="file of results; finished shapes in it are not repeated")
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    if unknown := sorted(set(names) - MODELS.keys()):
        parser.error(f"no shapes of '{unknown[0]}'; choose from {', '.join(MODELS)}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    settings = {"scale": arguments.scale, "threads": torch.get_num_threads(), "torch": torch.__version__}
    results = Results(arguments.json, settings)
    print(f"float64, {RETAIN:.0%} retention, {settings['threads']} threads, torch {settings['torch']}")
    measure(64, 64)  # first calls load libraries
    totals = {}
    for name in names:
        shapes = [(max(8, o // arguments.scale), max(8, i // arguments.scale), count) for o, i, count in MODELS[name]]
        totals[name] = report(name, shapes, results)
        results.write(totals)


if __name__ == "__main__":
    main()
