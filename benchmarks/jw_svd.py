"""Tables 3 and 4 of the JW-SVD paper on the built-in model: the weight γ of image moments, and GPTQ with it and alone.

    python benchmarks/jw_svd.py OUT                  # both tables; OUT takes statistics, or has them
    python benchmarks/jw_svd.py OUT --only gptq --bits 4,3,2

Table 3: `jw-svd` with γ times the weight at which the traces of text and image moments are equal. Table 4: all linears
in integers of so many bits by GPTQ in the same joint moments, and in text moments alone; then `jw-svd+gptq` with
factors of 4 and of 8 bits in the same bytes, scales included. Sizes are those of a model in bfloat16, computation is
in float32. Each row is printed as soon as it is measured; date, versions and seed follow.
"""

import argparse
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recipes import measure, rounded, stored_in
from spectrim.calibrate import Statistics, calibrate
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.errors import BudgetError
from spectrim.evaluate import load_questions
from spectrim.pipeline.stages import Compression
from spectrim.plan.plan import Plan, plan_row
from spectrim.recipe import Recipe
from spectrim.samples import load_text


@dataclass(frozen=True)
class Bench:
    """What both tables share."""

    model: Any
    processor: Any
    statistics: Statistics
    text: str
    questions: Any
    args: argparse.Namespace

    def prepared(self, recipe: str, **changes: Any) -> Compression:
        """A compression of linears that are stored in bfloat16."""
        read = Recipe.read(recipe, {name.replace("_", "."): value for name, value in changes.items()})
        return stored_in(torch.bfloat16, self.model, read, self.statistics, self.processor)

    def row(self, cells: list[str], prepared: Compression | None = None, plan: Plan | None = None) -> None:
        """Measure a plan, or the dense model, and print its row."""
        if prepared is None or plan is None:
            found, bits = measure(self.model, self.processor, self.text, self.questions, self.args), 16.0
        else:
            bits = 16 * plan.bytes / plan.dense_bytes
            with prepared.applied(plan) as small:
                rounded(small, torch.bfloat16)
                found = measure(small, self.processor, self.text, self.questions, self.args)
        quality = [f"{found['perplexity']:.2f}", f"{100 * found['mean']:.1f}"]
        print(f"| {' | '.join([*cells, f'{bits / 16:.2%}', f'{bits:.2f}', *quality])} |", flush=True)


def heading(*names: str) -> None:
    """The head of a table."""
    every = [*names, "bytes", "bits", "perplexity", "VQA, %"]
    print(f"\n| {' | '.join(every)} |\n|{'---|' * len(every)}", flush=True)


def gammas(bench: Bench) -> None:
    """Table 3."""
    heading("γ", "retain")
    bench.row(["dense", ""])
    for gamma in (float(part) for part in bench.args.gammas.split(",")):
        prepared = bench.prepared("jw-svd", metric_gamma=gamma)
        for retain in (float(part) for part in bench.args.retain.split(",")):
            bench.row([f"{gamma:g}", f"{retain:.0%}"], prepared, prepared.plan(retain))


def alone(prepared: Compression) -> Plan:
    """Every linear in integers of the recipe's bits."""
    linears = {}
    for name, menu in prepared.maker.menus(prepared.parts.linears).items():
        options = (menu.option(number) for number in range(len(menu.bytes)))
        form, spec = next(option for option in options if option[0] == "integers")
        linears[name] = plan_row(menu.linear, form, spec, loss=0.0)
    return Plan(recipe=prepared.recipe.name, linears=linears)


def compounds(bench: Bench) -> None:
    """Table 4."""
    heading("storage")
    for bits in (int(part) for part in bench.args.bits.split(",")):
        for modality in ("joint", "text"):
            prepared = bench.prepared("jw-svd+gptq", quantize_bits=bits, metric_modality=modality)
            plan = alone(prepared)
            bench.row([f"GPTQ alone, {bits} bits, {modality} moments"], prepared, plan)
        for factors in (4, 8):
            prepared = bench.prepared("jw-svd+gptq", quantize_bits=factors)
            try:
                small = prepared.plan(plan.bytes / plan.dense_bytes)
            except BudgetError:
                continue  # no option so small
            if any(row.form != "integers" for row in small.linears.values()):  # else it is GPTQ alone
                bench.row([f"JW-SVD + GPTQ, {factors} bits"], prepared, small)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=("gamma", "gptq"))
    parser.add_argument("--gammas", default="0.1,0.5,1,2,10")
    parser.add_argument("--retain", default="0.6,0.4,0.3")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--questions", type=int, default=60, help="of each task")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source, home = resolve("demo"), args.out / "statistics"
    model, processor = load(source, dtype=torch.float32), load_processor(source)
    statistics = Statistics.open(home) if home.exists() else calibrate(
        model, home, processor=processor, samples=args.samples, seqlen=128, seed=args.seed, curvature=False
    )  # fmt: skip
    text = load_text("builtin", split="heldout")
    bench = Bench(model, processor, statistics, text, load_questions("builtin", args.questions, args.seed), args)
    if args.only != "gptq":
        gammas(bench)
    if args.only != "gamma":
        compounds(bench)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, {versions}, python {platform.python_version()}, seed {args.seed}")


if __name__ == "__main__":
    main()
