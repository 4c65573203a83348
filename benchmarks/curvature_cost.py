"""What output moments cost: bytes by form for the shapes of three models, and a measured pass on one model.

    python benchmarks/curvature_cost.py [--gib 8]
    python benchmarks/curvature_cost.py --measure demo [--samples 64] [--seqlen 128]
    python benchmarks/curvature_cost.py --measure smollm2.gguf --text cal.txt --samples 16 --seqlen 512

The table is computed: all output moments of one modality in each form, and the passes that full ones take when
each has so much memory for them. The measurement runs `spectrim.calibrate` without and with
curvature, each in a process of its own, and prints wall time and peak resident memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from spectrim.calibrate import calibrate
from spectrim.calibrate.forms import CurvatureForm, choose_forms
from spectrim.calibrate.groups import grouped, output_shares
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.linear import Linear, Place

# (place, role, out, in, heads, count): heads of q, k and v; the towers' fused qkv and mergers have none.
_TOWER: list[tuple[Place, str, int, int, int | None, int]] = [
    ("tower", "qkv", 3840, 1280, None, 32),
    ("tower", "o", 1280, 1280, None, 32),
    ("tower", "gate", 3420, 1280, None, 32),
    ("tower", "up", 3420, 1280, None, 32),
    ("tower", "down", 1280, 3420, None, 32),
    ("connector", "fc1", 5120, 5120, None, 1),
]


def _backbone(
    width: int, inner: int, heads: int, kv: int, size: int, layers: int
) -> list[tuple[Place, str, int, int, int | None, int]]:
    return [
        ("backbone", "q", heads * size, width, heads, layers),
        ("backbone", "k", kv * size, width, kv, layers),
        ("backbone", "v", kv * size, width, kv, layers),
        ("backbone", "o", width, heads * size, None, layers),
        ("backbone", "gate", inner, width, None, layers),
        ("backbone", "up", inner, width, None, layers),
        ("backbone", "down", width, inner, None, layers),
    ]


MODELS = {
    "SmolLM2-135M": _backbone(576, 1536, 9, 3, 64, 30),
    "Qwen2.5-VL-3B": [*_TOWER, ("connector", "fc2", 2048, 5120, None, 1), *_backbone(2048, 11008, 16, 2, 128, 36)],
    "Qwen2.5-VL-7B": [*_TOWER, ("connector", "fc2", 3584, 5120, None, 1), *_backbone(3584, 18944, 28, 4, 128, 28)],
}


def linears(model: str) -> list[Linear]:
    return [
        Linear(f"{place}.{i}.{role}", place, f"{place}.{i}", role, out, size, heads, torch.bfloat16)
        for place, role, out, size, heads, count in MODELS[model]
        for i in range(count)
    ]


def computed(limit: float) -> None:
    """Print the table of bytes."""
    print(
        f"| model | full | blocks of 128 | sketch of 256 | diagonal | passes for full, {limit:g} GiB of moments each |"
    )
    print("|---|---|---|---|---|---|")
    for model in MODELS:
        every = linears(model)
        cells = []
        for form in ("full", "blocks:128", "sketch:256", "diagonal"):
            kind = CurvatureForm.read(form)
            # Narrow outputs hold less than one block or sketch: those are kept whole.
            forms = {x.name: kind if x.out_features >= kind.size else CurvatureForm("full") for x in every}
            whole = {x.name: CurvatureForm("full") for x in every}
            pairs = zip(*(output_shares(every, chosen, fisher=False) for chosen in (forms, whole)), strict=True)
            total = sum(min(one.nbytes, other.nbytes) for one, other in pairs)
            cells.append(f"{total / 2**30:.3f} GiB")
        groups = grouped(output_shares(every, choose_forms(every, {}), fisher=False), int(limit * 2**30))
        print(f"| {model} | {' | '.join(cells)} | {len(groups)} |")


def measured(args: argparse.Namespace, curvature: bool) -> dict[str, float]:
    """One calibration in this process."""
    torch.set_num_threads(args.threads)
    source = resolve(args.measure)
    model, processor = load(source, dtype=torch.float32), load_processor(source)
    before, started = _peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        calibrate(
            model, Path(folder) / "s", processor=processor, text=args.text, samples=args.samples, seqlen=args.seqlen,
            curvature=curvature,
        )  # fmt: skip
    return {"seconds": time.perf_counter() - started, "peak": _peak(), "before": before}


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Parse the command line, compute or measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--measure", help="model to calibrate")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", choices=("plain", "curvature"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args, args.child == "curvature")))
        return
    if args.measure is None:
        computed(args.gib)
        return
    rows = {}
    for kind in ("plain", "curvature"):
        done = subprocess.run([sys.executable, *sys.argv, "--child", kind], check=True, capture_output=True, text=True)
        rows[kind] = json.loads(done.stdout.splitlines()[-1])
    print("| pass | seconds | peak GiB | before it |\n|---|---|---|---|")
    for kind, row in rows.items():
        print(f"| {kind} | {row['seconds']:.1f} | {row['peak'] / 2**30:.2f} | {row['before'] / 2**30:.2f} |")
    ratio = rows["curvature"]["seconds"] / rows["plain"]["seconds"]
    print(f"\nPlain and curvature together take {ratio:.2f} times the plain pass alone.")


if __name__ == "__main__":
    main()
