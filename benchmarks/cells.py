"""Predicted against measured loss by part and role: each alone is compressed as a plan says, all else stays dense.

    python benchmarks/cells.py demo --stats STATS --retain 0.6,0.35,0.2 [--set quantize.bits=auto]

Measured is the Kullback–Leibler divergence from the dense model, nats per token, on samples that the statistics did not
see (the same sources with another seed): text at every token, images at their answers. Linears are not compensated.
Prints a table for each budget, whose last rows are whole parts and the whole model.
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
from spectrim.plan.plan import plan_row


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", type=Path, required=True)
    parser.add_argument("--retain", default="0.6,0.35,0.2")
    parser.add_argument("--recipe", default="spectrim")
    parser.add_argument("--set", action="append", default=[], help="of the recipe: key=value")
    parser.add_argument("--tokens", type=int, default=2048, help="of each modality")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    source, statistics = resolve(args.model), Statistics.open(args.stats)
    model, processor = load(source), load_processor(source)
    manifest = statistics.manifest
    data = source_data(model, processor, statistics, sees=manifest.data.images is not None, seed=args.seed)
    pairs = [change.split("=", 1) for change in args.set]
    changes = {"compensate.kind": "none"} | {key: parse_yaml(value.encode()) for key, value in pairs}
    given: dict[str, Any] = {"stats": statistics, "processor": processor, "changes": changes}
    with compression(model, args.recipe, **given) as prepared, tempfile.TemporaryDirectory() as folder:
        dense = Predictions(Path(folder))
        dense.gather(model, data, tokens=args.tokens, seed=args.seed, progress=None)
        linears = prepared.parts.linears
        cells: dict[str, list[str]] = {}
        for linear in linears:
            cells.setdefault(f"{linear.place} {linear.role}", []).append(linear.name)
        for linear in linears:
            cells.setdefault(linear.place, []).append(linear.name)
        cells["all"] = [linear.name for linear in linears]
        for retain in map(float, args.retain.split(",")):
            plan = prepared.plan(retain)
            titles = [f"{m} predicted | measured | ratio" for m in manifest.data.modalities]
            print(f"\n| {retain:.0%} | kept | {' | '.join(titles)} |\n|{'---|' * (2 + 3 * len(titles))}")
            for name, members in cells.items():
                inside = set(members)
                rows = {x.name: plan.linears[x.name] if x.name in inside else plan_row(x) for x in linears}
                part = plan.model_copy(update={"linears": rows})
                if not part.changed:
                    continue
                predicted = prepared.predicted(part) or {}
                with prepared.applied(part) as small:
                    measured = {str(row.modality): row.mean for row in dense.compare(small)}
                kept = sum(rows[x].bytes for x in members) / sum(rows[x].dense_bytes for x in members)
                shown = [
                    f"{predicted[m]:.4f} | {value:.4f} | {predicted[m] / value:.2f}" if value > 1e-5 else "0 | 0 | –"
                    for m, value in measured.items()
                ]
                print(f"| {name} | {kept:.0%} | {' | '.join(shown)} |", flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("spectrim", "torch", "transformers"))
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, {packages}, seed {args.seed}")


if __name__ == "__main__":
    main()
