"""Perplexity by stored bits per weight: each kind of storage alone, and all of them together.

    python benchmarks/bits.py smollm2.gguf --stats STATS --out bits.json

Every kind spends the same bytes by predicted loss: dense integers (fed on in the metric, or rounded to nearest),
factors of 16 bits (by pivots), factors of 4 or 8 bits, integers with factors beside them, and the hybrid of all, each
linear by itself; then the hybrid as the recipe `spectrim` makes it, with compensation. Bytes are those of a model in
bfloat16, scales included; computation is in float32. The statistics need curvature. A row is printed as soon as it is
measured; `--predict` prints predicted losses alone, which takes a small part of the time.
"""

import argparse
import json
import math
import platform
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from recipes import stored_in
from spectrim.calibrate import Statistics
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.errors import BudgetError
from spectrim.evaluate import perplexity
from spectrim.plan.plan import Plan, plan_row
from spectrim.plan.spend import Curve, spend
from spectrim.recipe import Recipe
from spectrim.samples import load_text
from spectrim.storage import Spec

COMPENSATED = "hybrid, compensated"
KINDS: dict[str, Callable[[str, Spec], bool]] = {
    COMPENSATED: lambda form, spec: True,
    "hybrid": lambda form, spec: True,
    "integers": lambda form, spec: form == "integers",
    "factors": lambda form, spec: form in ("low-rank", "dense"),
    "factors, 4 bits": lambda form, spec: form == "integer-factors" and spec["grids"]["B"]["bits"] == 4,
    "factors, 8 bits": lambda form, spec: form == "integer-factors" and spec["grids"]["B"]["bits"] == 8,
    "integers + factors": lambda form, spec: form == "integers+factors",
}


def used(plan: Plan) -> dict[str, int]:
    """How many linears have each form, with the bits of their integers."""
    found: Counter[str] = Counter()
    for row in plan.linears.values():
        grids = [row.spec] if row.form == "integers" else row.spec.get("grids", {}).values()
        found[" ".join([row.form, *map(str, sorted({grid["bits"] for grid in grids}))])] += 1
    return dict(sorted(found.items()))


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", type=Path, required=True)
    parser.add_argument("--bits", default="2.5,3,3.5,4,6", help="stored bits per weight")
    parser.add_argument("--kinds", help="joined by ;, else all, and integers that are rounded to nearest")
    parser.add_argument("--heldout", default="builtin", help="text for perplexity")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source = resolve(args.model)
    model, processor = load(source, dtype=torch.float32), load_processor(source)
    tokenizer, text = getattr(processor, "tokenizer", processor), load_text(args.heldout, split="heldout")

    def measured() -> float:
        return perplexity(model, tokenizer, text, seqlen=args.window, max_tokens=args.max_tokens).per_token

    dense = None if args.predict else measured()
    rows = [{"kind": "dense", "bits": 16.0, "perplexity": dense}]
    wanted = args.kinds.split(";") if args.kinds else [*KINDS, "integers, to nearest"]
    for method in ("gptq", "rtn"):
        kinds = {"integers, to nearest": KINDS["integers"]} if method == "rtn" else KINDS
        if not kinds.keys() & set(wanted):
            continue
        changes = {"quantize.bits": "auto", "quantize.method": method}
        recipes = {kind: Recipe.read("spectrim", changes | {"compensate.kind": kind}) for kind in ("none", "anchored")}
        prepared = stored_in(torch.bfloat16, model, recipes["none"], Statistics.open(args.stats), processor)
        narrow = prepared.parts.linears
        weights = sum(linear.params for linear in narrow)
        menus = prepared.maker.menus(narrow)
        for bits in map(float, args.bits.split(",")):
            for kind in (kind for kind in wanted if kind in kinds):
                found = {
                    name: np.array([n for n in range(len(menu.bytes)) if kinds[kind](*menu.option(n))], int)
                    for name, menu in menus.items()
                }
                if any(not len(numbers) for numbers in found.values()):
                    continue
                curves = [Curve(menus[name].bytes[few], menus[name].error[few]) for name, few in found.items()]
                try:
                    chosen = spend(curves, int(bits * weights / 8))
                except BudgetError:
                    continue  # this kind has no option so small
                prepared.recipe = recipes["anchored" if kind == COMPENSATED else "none"]
                linears = {}
                for linear, number in zip(narrow, chosen, strict=True):
                    menu, option = menus[linear.name], int(found[linear.name][number])
                    linears[linear.name] = plan_row(linear, *menu.option(option), loss=float(menu.error[option]))
                plan = Plan(recipe=prepared.recipe.name, linears=linears)
                row = {"kind": kind, "asked": bits, "bits": 8 * plan.bytes / weights, "predicted": plan.loss}
                row["used"] = used(plan)
                if dense is not None:
                    with prepared.applied(plan):
                        row["perplexity"] = measured()
                    row["measured"] = math.log(row["perplexity"] / dense)
                rows.append(row)
                print(json.dumps(row), flush=True)
    versions = {name: version(name) for name in ("torch", "transformers", "compressed-tensors")}
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions | {"python": platform.python_version()},
        "settings": {key: str(value) for key, value in vars(args).items() if key not in ("out", "model", "stats")},
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(rows))


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table; nats are the increase of the loss per token."""
    lines = ["| storage | bits | perplexity | nats | predicted |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row["kind"], f"{row['bits']:.2f}"]
        cells += [f"{row[key]:.{n}f}" if row.get(key) is not None else "" for key, n in
                  (("perplexity", 2), ("measured", 3), ("predicted", 3))]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
