"""A mixture of experts at several sizes: what compressing its experts is worth, and in which way.

    python tools/upcycle_demo.py --out DIR --fresh 0.1 --batch 12 --text-batch 1
    python benchmarks/mixture.py DIR --out WORK

Calibrates once, compresses by every recipe in every way at every size, evaluates the checkpoints and times each in turn
with the dense model, and prints one Markdown table. Where experts stay dense, sizes are those that are possible then.
WORK keeps statistics, checkpoints and rows; a run that was stopped goes on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from spectrim.anatomy import anatomy
from spectrim.bench import bench
from spectrim.calibrate import calibrate
from spectrim.checkpoint import load, load_processor
from spectrim.errors import BudgetError
from spectrim.evaluate import evaluate
from spectrim.pipeline import compression

WAYS: dict[str, dict[str, Any]] = {
    "factors": {},
    "bits auto": {"quantize.bits": "auto"},
    "bits auto, one form": {"quantize.bits": "auto", "storage.experts": "same"},
    "factors, one form": {"storage.experts": "same"},
    "experts dense": {"allocation.keep": ["*.experts.*"]},
}


def measured(paths: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Quality and bytes of the dense model, the first, and of checkpoints, and how many times as fast they are."""
    tasks = ("perplexity", "vqa", "kl") if len(paths) > 1 else ("perplexity", "vqa")
    report = evaluate(paths, tasks=tasks, samples=args.questions, max_tokens=args.max_tokens, seqlen=256, blind=False)
    rows = []
    for path, result in zip(paths, report.results, strict=True):
        assert result.perplexity is not None
        assert result.vqa is not None
        row = {"bytes": result.bytes, "accuracy": result.vqa.mean, "perplexity": result.perplexity.per_token}
        row |= {"kl": {x.modality: x.mean for x in result.divergence}}
        if path != paths[0]:
            names = ["dense", "small"]
            timed = bench([paths[0], path], names=names, prompt=64, new=24, repeats=args.repeats).rows[1]
            row |= {"decode": timed.decode.ratio, "prefill": timed.prefill.ratio}
        rows.append(row)
    return rows


def main() -> None:
    """Parse the command line, make, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", default="spectrim,curvature")
    parser.add_argument("--retain", default="0.6,0.4,0.3,0.2", help="shares of the linears' bytes")
    parser.add_argument("--dense-experts", default="0.96,0.93,0.91", help="the same where experts stay dense")
    parser.add_argument("--ways", default=";".join(WAYS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--questions", type=int, default=30, help="of each task")
    parser.add_argument("--max-tokens", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "rows.json"
    rows: dict[str, Any] = json.loads(log.read_text()) if log.exists() else {}
    model, processor = load(args.model), load_processor(args.model)
    statistics = calibrate(
        model, args.out / "statistics", processor=processor, samples=args.samples, seqlen=args.seqlen, gradients=False
    )
    for way in args.ways.split(";"):
        for recipe in args.recipes.split(","):
            sizes = (args.dense_experts if way == "experts dense" else args.retain).split(",")
            wanted = {f"{recipe} | {way} | {float(x):.0%}": float(x) for x in sizes}
            wanted = {name: retain for name, retain in wanted.items() if name not in rows}
            made = {}
            if not wanted:
                continue
            with compression(model, recipe, stats=statistics, processor=processor, changes=WAYS[way]) as prepared:
                for name, retain in wanted.items():
                    place = args.out / "-".join(name.replace("%", "").replace(",", "").replace(" | ", " ").split())
                    try:
                        plan = prepared.plan(retain)
                    except BudgetError as error:
                        print(f"{name}: {error}")
                        continue
                    if not place.exists():
                        prepared.save(plan, place, processor=args.model)
                    made[name] = str(place)
            found = measured([args.model, *made.values()], args)
            rows |= dict(zip(["dense | – | 100%", *made], found, strict=True))
            log.write_text(json.dumps(rows, indent=1) + "\n")
            print(table(rows), flush=True)
    linears = anatomy(model).linears
    share = sum(x.params for x in linears if x.expert is not None) / sum(x.params for x in linears)
    print(f"{table(rows)}\nexperts are {share:.0%} of the linears")


def table(rows: dict[str, Any]) -> str:
    """The rows as a Markdown table; times as multiples of the dense model's."""
    head = "recipe|experts|linears|file, MB|of dense|VQA|perplexity|KL text|KL images|prefill|decode"
    lines = [f"| {head.replace('|', ' | ')} |", "|---" * (head.count("|") + 1) + "|"]
    dense = rows["dense | – | 100%"]
    for name, row in rows.items():
        cells = [f"{row['bytes'] / 1e6:.1f}", f"{row['bytes'] / dense['bytes']:.1%}", f"{100 * row['accuracy']:.1f}"]
        cells.append(f"{row['perplexity']:.2f}")
        cells += [f"{row['kl'][kind]:.4f}" if kind in row["kl"] else "–" for kind in ("text", "image")]
        cells += [f"{row[kind]:.2f}" if kind in row else "–" for kind in ("prefill", "decode")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
