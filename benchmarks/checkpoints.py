"""Checkpoints of every recipe at every budget, with their digests and the seconds that each took.

    python benchmarks/checkpoints.py demo OUT                          # writes OUT/checkpoints.json
    python benchmarks/checkpoints.py demo NEW --against OLD            # besides, a table of what differs
    python benchmarks/checkpoints.py smollm2.gguf OUT --text calibration.txt --seqlen 512 --samples 128 --recipes laser

OUT/statistics is used where it is there. Every recipe starts without spectra and opens the statistics anew for each
budget, as `spectrim compress` does: the first budget pays for what is kept on disk, the others find it there. Of two
checkpoints of one name, tensors are compared by name, dtype, shape and bytes.
"""

import argparse
import hashlib
import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from spectrim.calibrate import Statistics, calibrate
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.files import parse_yaml
from spectrim.pipeline import compression

RECIPES = (
    "svd,fwsvd,asvd,svd-llm,jw-svd,curvature,laser,adasvd,spectrim,"
    "jw-svd+gptq,curvature+gptq,laser+gptq,spectrim:quantize.bits=auto"
)


def digests(directory: Path) -> dict[str, str]:
    """Every tensor of a checkpoint, and its quantization_config without the release, as a digest."""
    found: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
                found[name] = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + raw).hexdigest()
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    config.pop("spectrim_version", None)
    found["config"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return found


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Write all checkpoints; a row for each."""
    source = resolve(args.model)
    processor, home = load_processor(source), args.out / "statistics"
    model = load(source, dtype=torch.float32)
    if not home.exists():
        calibrate(
            model,
            home,
            processor=processor,
            text=args.text,
            samples=args.samples,
            seqlen=args.seqlen,
            gradients=True,
            curvature=True,
        )
    rows: dict[str, Any] = {}
    for entry in args.recipes.split(","):
        name, *changes = entry.split(":")
        values = {key: parse_yaml(value.encode()) for key, _, value in (change.partition("=") for change in changes)}
        for kept in ("spectra", "compensated", "options"):
            shutil.rmtree(home / kept, ignore_errors=True)
        for retain in map(float, args.retain.split(",")):
            target = args.out / f"{entry.replace(':', '-')}-{retain}"
            shutil.rmtree(target, ignore_errors=True)
            started = time.perf_counter()
            with compression(model, name, stats=Statistics.open(home), processor=processor, changes=values) as prepared:
                plan = prepared.plan(retain)
                prepared.save(plan, target, processor=source)
            row = {"seconds": time.perf_counter() - started, "bytes": plan.bytes / plan.dense_bytes, "loss": plan.loss}
            rows[f"{entry} {retain}"] = row | {"digests": digests(target)}
            print(f"{entry} {retain}: {row['seconds']:.1f} s, {row['bytes']:.5f} of the bytes", flush=True)
    return rows


def main() -> None:
    """Write the checkpoints, and compare them with those of another run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="the OUT of an earlier run")
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--retain", default="0.8,0.4,0.2")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--seqlen", type=int, default=128)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = measured(args)
    (args.out / "checkpoints.json").write_text(json.dumps(rows, indent=1) + "\n")
    before = {} if args.against is None else json.loads((args.against / "checkpoints.json").read_text())
    print(f"\nspectrim {version('spectrim')}, torch {torch.__version__}, transformers {version('transformers')}\n")
    print("| checkpoint | bytes kept | seconds | before | tensors equal |\n|---|---|---|---|---|")
    for name, row in rows.items():
        old, now = before.get(name), row["digests"]
        equal = "" if old is None else f"{sum(old['digests'].get(k) == v for k, v in now.items())} of {len(now)}"
        took = "" if old is None else f"{old['seconds']:.1f}"
        print(f"| {name} | {row['bytes']:.5f} | {row['seconds']:.1f} | {took} | {equal} |")


if __name__ == "__main__":
    main()
