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
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from spectrim.plan.hybrid import Option, cheapest

from recipes import stored_in
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.errors import BudgetError
from spectrim.evaluate import perplexity
from spectrim.pipeline import compression
from spectrim.plan.plan import Plan
from spectrim.recipe import Recipe
from spectrim.samples import load_text

COMPENSATED = "hybrid, compensated"
KINDS: dict[str, Callable[[Option], bool]] = {
    COMPENSATED: lambda option: True,
    "hybrid": lambda option: True,
    "integers": lambda o: o.rank is None and o.integers is not None,
    "factors": lambda o: o.integers is None,
    "factors, 4 bits": lambda o: o.rank is not None and o.integers is not None and o.integers.bits == 4,
    "factors, 8 bits": lambda o: o.rank is not None and o.integers is not None and o.integers.residual is None
    and o.integers.bits == 8,
    "integers + factors": lambda o: o.integers is not None and o.integers.residual is not None,
}  # fmt: skip


def used(plan: Plan) -> dict[str, int]:
    """How many linears have each kind of storage."""
    found: dict[str, int] = {}
    for row in plan.linears.values():
        how = row.integers
        name = "16" if how is None else f"{how.bits}" if how.residual is None else f"{how.residual}+{how.bits}"
        name = f"{'dense' if row.rank is None else 'factors'} {name}"
        found[name] = found.get(name, 0) + 1
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
        with compression(model, "spectrim", stats=args.stats, processor=processor, changes=changes) as prepared:
            recipes = {kind: Recipe.read(prepared.recipe, {"compensate.kind": kind}) for kind in ("none", "anchored")}
            prepared.parts = stored_in(prepared.parts, torch.bfloat16)
            narrow = prepared.parts.linears
            weights = sum(linear.params for linear in narrow)
            menus = {linear.name: prepared.hybrid.options(linear) for linear in narrow}
            for bits in map(float, args.bits.split(",")):
                for kind in (kind for kind in wanted if kind in kinds):
                    menu = {name: [o for o in found if kinds[kind](o)] for name, found in menus.items()}
                    if any(not found for found in menu.values()):
                        continue
                    try:
                        chosen = cheapest(menu, int(bits * weights / 8))
                    except BudgetError:
                        continue  # this kind has no option so small
                    prepared.recipe = recipes["anchored" if kind == COMPENSATED else "none"]
                    plan = Plan(
                        recipe=prepared.recipe.name,
                        linears={
                            linear.name: chosen[linear.name].row(linear, loss=chosen[linear.name].cost)
                            for linear in narrow
                        },
                    )
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
