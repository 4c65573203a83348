"""Recipes by the divergence from the dense model on samples that they have not seen: what constants are chosen by.

    python benchmarks/left_out.py demo --stats STATS --store bfloat16 --retain 0.1,0.25 \\
        --recipes spectrim:quantize.bits=auto,spectrim:quantize.bits=auto:quantize.damping=0.01

Samples are of the sources of the statistics, with another seed: text at every token, images at the answers of the dense
model. `--images` gives a .jsonl of other questions to ask as well (`benchmarks/calibration_questions.py` writes one).
"""

import argparse
import math
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from recipes import changed, rounded, stored_in
from spectrim.calibrate import Statistics
from spectrim.calibrate.data import load_data, source_data
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.evaluate.divergence import Predictions


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", type=Path, required=True)
    parser.add_argument("--recipes", default="spectrim")
    parser.add_argument("--retain", default="0.4,0.2")
    parser.add_argument("--images", help="questions, beside those of the statistics' sources")
    parser.add_argument("--store", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=8192, help="of each modality at most")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    source, statistics = resolve(args.model), Statistics.open(args.stats)
    model, processor = load(source, dtype=torch.float32), load_processor(source)
    sees = statistics.manifest.data.images is not None
    data = {"": source_data(model, processor, statistics, sees=sees, seed=args.seed)}
    if args.images is not None:
        count = len(Path(args.images).read_text().splitlines())
        given = {"samples": count, "seqlen": 128, "seed": args.seed, "instruction": "Describe this image."}
        data["questions"] = load_data(model, processor, text=None, images=args.images, sees=True, **given)
    store = getattr(torch, args.store)
    with tempfile.TemporaryDirectory() as folder:
        dense = {}
        for name, samples in data.items():
            dense[name] = Predictions(Path(folder, name))
            Path(folder, name).mkdir(exist_ok=True)
            dense[name].gather(model, samples, tokens=args.tokens, seed=args.seed, progress=None)
        names: list[str] = []
        for recipe in args.recipes.split(","):
            prepared = stored_in(store, model, changed(recipe), statistics, processor)
            for retain in map(float, args.retain.split(",")):
                plan = prepared.plan(retain)
                with prepared.applied(plan) as small:
                    rounded(small, store)
                    found = {
                        name or str(row.modality): row.mean for name, one in dense.items() for row in one.compare(small)
                    }
                if not names:
                    names = list(found)
                    print(f"| recipe | bytes | predicted | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
                loss = math.nan if plan.loss is None else plan.loss
                cells = " | ".join(f"{found[name]:.4f}" for name in names)
                print(f"| `{recipe}` | {retain:.1%} | {loss:.4f} | {cells} |", flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("spectrim", "torch", "transformers"))
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, {packages}, seed {args.seed}")


if __name__ == "__main__":
    main()
