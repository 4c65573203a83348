"""What `spectrim plan --measure` says that sizes cost, against what they cost on samples that it did not see.

    python benchmarks/predictions.py demo --stats STATS --retain 0.3 --check 0.5,0.35,0.25 [--set quantize.bits=auto]

Plans are measured as the command does it, for the size `--retain`; each size of `--check` is then made as the recipe
says (with compensation) and measured on samples of the same sources with another seed: text at every token, images at
their answers. Nats per token.
"""

import argparse
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spectrim import compression
from spectrim.calibrate import Statistics
from spectrim.calibrate.data import source_data
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.evaluate.divergence import Predictions
from spectrim.files import parse_yaml
from spectrim.pipeline.budget import Budget
from spectrim.pipeline.outlook import outlook


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", type=Path, required=True)
    parser.add_argument("--retain", type=float, required=True)
    parser.add_argument("--check", default="0.5,0.35,0.25,0.18")
    parser.add_argument("--recipe", default="spectrim")
    parser.add_argument("--set", action="append", default=[], help="of the recipe: key=value")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    source, statistics = resolve(args.model), Statistics.open(args.stats)
    model, processor = load(source), load_processor(source)
    manifest = statistics.manifest
    data = source_data(model, processor, statistics, sees=manifest.data.images is not None, seed=args.seed)
    pairs = [change.split("=", 1) for change in args.set]
    changes = {key: parse_yaml(value.encode()) for key, value in pairs}
    given: dict[str, Any] = {"stats": statistics, "processor": processor, "changes": changes}
    with compression(model, args.recipe, **given) as prepared, tempfile.TemporaryDirectory() as folder:
        dense = Predictions(Path(folder))
        dense.gather(model, data, tokens=8192, seed=args.seed, progress=None)
        outlook(prepared, Budget(args.retain), measured=True)
        assert prepared.measured
        titles = [f"{modality}: told | found | told / found" for modality in manifest.data.modalities]
        print(f"| bytes | predicted | {' | '.join(titles)} |\n|{'---|' * (2 + 3 * len(titles))}")
        for retain in map(float, args.check.split(",")):
            plan = prepared.plan(retain)
            assert plan.loss
            with prepared.applied(plan) as small:
                found = {str(row.modality): row.mean for row in dense.compare(small)}
            told = prepared.measured.at(plan.loss)
            cells = [f"{told[name]:.4f} | {nats:.4f} | {told[name] / nats:.2f}" for name, nats in found.items()]
            print(f"| {retain:.1%} | {plan.loss:.4f} | {' | '.join(cells)} |", flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("spectrim", "torch", "transformers"))
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, {packages}, seed {args.seed}")


if __name__ == "__main__":
    main()
