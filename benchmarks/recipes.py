"""Every recipe at every budget on one model: text perplexity, and VQA accuracy where the model has a vision tower.

    python benchmarks/recipes.py demo --out results/demo.json
    python benchmarks/recipes.py smollm2.gguf --text cal.txt --heldout test.txt --recipes svd,asvd,svd-llm --out s.json
    python benchmarks/recipes.py demo --easy-vqa easy_vqa/data --out results/easy-vqa.json

Calibrates once; each recipe is decomposed once for all budgets. A recipe may carry changes:
``jw-svd:allocation.rule=uniform``. Prints Markdown tables of quality, of predicted losses, and of time and peak memory,
with date, versions and seed.
"""

import argparse
import json
import math
import platform
import resource
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.evaluate import Question, blind_questions, load_questions, perplexity, vqa
from spectrim.evaluate.results import score
from spectrim.files import parse_yaml
from spectrim.metrics.spectra import cache_key, make_spectra
from spectrim.pipeline.stages import Compression
from spectrim.recipe import Recipe
from spectrim.samples import load_text
from spectrim.storage import stored_layers

RECIPES = "spectrim,laser,curvature,jw-svd,adasvd,svd-llm,asvd,fwsvd,svd"


def peak_bytes() -> int:
    """Peak resident memory of this process since the last call; since its start where there is no Linux /proc."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    status = Path("/proc/self/status").read_text()
    reset.write_text("5")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def easy_vqa(folder: Path, count: int) -> list[Question]:
    """The first `count` test questions with a yes/no answer, and as many of the others, as two tasks."""
    found: dict[str, list[Question]] = {"open": [], "yes/no": []}
    for question, answer, index in json.loads((folder / "test" / "questions.json").read_text()):
        kind = found["yes/no" if answer in ("yes", "no") else "open"]
        if len(kind) < count:
            image = Image.open(folder / "test" / "images" / f"{index}.png").convert("RGB")
            kind.append(Question("", image, question[0].upper() + question[1:], answer))
    return [Question(f"easy-vqa {name}", q.image, q.question, q.answer) for name, list_ in found.items() for q in list_]


def stored_in(dtype: torch.dtype, model: Any, recipe: Recipe, statistics: Statistics, processor: Any) -> Compression:
    """A compression of linears that are stored in a dtype, whatever the model computes in."""
    parts = anatomy(model)
    parts = replace(parts, linears=tuple(replace(linear, dtype=dtype) for linear in parts.linears))
    home = statistics.path / "spectra" / cache_key(recipe.metric, statistics, parts)
    spectra = make_spectra(model, parts, recipe.metric, statistics, home)
    return Compression(model, recipe, statistics, spectra, parts, processor)


def rounded(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round what is stored of the linears to a dtype, in place; it stays float32, and so does what is computed."""
    for layer in stored_layers(model).values():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))


def changed(name: str) -> Recipe:
    """A recipe that may carry changes: ``jw-svd:allocation.rule=uniform``."""
    recipe, *changes = name.split(":")
    pairs = (change.partition("=") for change in changes)
    return Recipe.read(recipe, {key: parse_yaml(value) for key, _, value in pairs})


def measure(model: Any, processor: Any, text: str, questions: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity per token and per byte, accuracy by task and mean."""
    language = perplexity(
        model,
        getattr(processor, "tokenizer", processor),
        text,
        seqlen=args.window,
        max_tokens=args.max_tokens,
    )
    row: dict[str, Any] = {"perplexity": language.per_token, "perplexity_per_byte": language.per_byte}
    if questions:
        started = time.perf_counter()
        scored = score(vqa(model, processor, questions), time.perf_counter() - started)
        row |= {"tasks": {task.task: task.accuracy for task in scored.tasks}, "mean": scored.mean}
    return row


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--retain", default="0.8,0.6,0.4")
    parser.add_argument("--text", default="builtin", help="calibration text")
    parser.add_argument("--images", default="builtin", help="calibration images, where the model sees")
    parser.add_argument("--heldout", default="builtin", help="text for perplexity")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--questions", type=int, default=100, help="of each task")
    parser.add_argument("--easy-vqa", type=Path, help="ask the test questions of this easy-vqa data folder instead")
    parser.add_argument(
        "--store", choices=("float32", "bfloat16"), default="float32", help="count bytes, and round, in this dtype"
    )
    parser.add_argument("--labels", default="given", help="of gradient passes: given or sampled")
    parser.add_argument("--stats", type=Path, help="keep the statistics here, or use those that are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source = resolve(args.model)
    # Computed in float32: the table compares recipes, not rounding.
    model, processor = load(source, dtype=torch.float32), load_processor(source)
    store = getattr(torch, args.store)
    sees = hasattr(processor, "image_processor")
    text = load_text(args.heldout, split="heldout")
    questions: Any = []
    if sees:
        questions = (
            easy_vqa(args.easy_vqa, args.questions)
            if args.easy_vqa
            else load_questions("builtin", args.questions, args.seed)
        )
    rows = [{"recipe": "dense", "retain": 1.0, "bytes": 1.0, **measure(model, processor, text, questions, args)}]
    if questions:
        started = time.perf_counter()
        floor = score(vqa(model, processor, blind_questions(questions)), time.perf_counter() - started)
        rows.append({"recipe": "blind", "retain": 1.0, "bytes": 1.0, "mean": floor.mean,
                     "tasks": {task.task: task.accuracy for task in floor.tasks}})  # fmt: skip
    names = args.recipes.split(",")
    peak_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        if args.stats is not None and args.stats.exists():
            statistics = Statistics.open(args.stats)
        else:
            statistics = calibrate(
                model,
                args.stats or Path(scratch),
                processor=processor,
                text=args.text,
                images=args.images,
                samples=args.samples,
                seqlen=args.seqlen,
                seed=args.seed,
                labels=args.labels,
                gradients=any(Recipe.read(name.partition(":")[0]).needs_gradients for name in names),
                curvature=any(Recipe.read(name.partition(":")[0]).needs_curvature for name in names),
            )
        calibration = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
        for name in names:
            peak_bytes()
            started = time.perf_counter()
            prepared = stored_in(store, model, changed(name), statistics, processor)
            decomposition = time.perf_counter() - started
            for retain in map(float, args.retain.split(",")):
                started = time.perf_counter()
                plan = prepared.plan(retain)
                with prepared.applied(plan) as small:
                    rounded(small, store)
                    budget, most = time.perf_counter() - started, peak_bytes()
                    found = measure(small, processor, text, questions, args)
                share = plan.bytes / plan.dense_bytes
                seconds = {"decompose": decomposition, "plan_and_factor": budget}
                row = {
                    "recipe": name,
                    "retain": retain,
                    "bytes": share,
                    **found,
                    "seconds": seconds,
                    "peak_bytes": most,
                }
                rows.append(row | {"predicted_loss": prepared.predicted(plan)})
                print(json.dumps(rows[-1]), flush=True)
                peak_bytes()
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "seed": args.seed,
        "settings": {key: str(value) for key, value in vars(args).items() if key not in ("out", "model")},
        "calibration": calibration,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    tasks = list(report["rows"][0].get("tasks", {}))
    head = ["recipe", "retain", "bytes", *tasks, *(["mean"] if tasks else []), "ppl/token", "ppl/byte"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in report["rows"]:
        cells = [row["recipe"], f"{row['retain']:.0%}", f"{row['bytes']:.2%}"]
        if tasks:
            cells += [f"{100 * row['tasks'][task]:.0f}" for task in tasks] + [f"{100 * row['mean']:.1f}"]
        if "perplexity" in row:
            cells += [f"{row['perplexity']:.2f}", f"{row['perplexity_per_byte']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if any(row.get("predicted_loss") for row in report["rows"]):
        lines += ["", *predictions(report["rows"])]
    lines += ["", *costs(report)]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return "\n".join([*lines, "", f"{report['date']}, {versions}, seed {report['seed']}"])


def predictions(rows: list[dict[str, Any]]) -> list[str]:
    """Predicted against measured text loss above the dense model, in nats per token."""
    lines = ["| recipe | retain | predicted | measured | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        if found := row.get("predicted_loss"):
            predicted, measured = found["text"], math.log(row["perplexity"] / rows[0]["perplexity"])
            cells = f"{row['retain']:.0%} | {predicted:.4f} | {measured:.4f} | {predicted / measured:.2f}"
            lines.append(f"| {row['recipe']} | {cells} |")
    return lines


def costs(report: dict[str, Any]) -> list[str]:
    """Seconds and peak memory of each recipe; decomposition serves all budgets."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if "seconds" in row:
            found.setdefault(row["recipe"], []).append(row)
    calibration = report["calibration"]
    gib = f"{calibration['peak_bytes'] / 2**30:.2f}"
    lines = ["| step | decompose, s | plan and factors of one budget, s | peak, GiB |", "|---|---|---|---|"]
    lines.append(f"| calibration, for all recipes, {calibration['seconds']:.0f} s | | | {gib} |")
    for name, rows in found.items():
        budgets = sum(row["seconds"]["plan_and_factor"] for row in rows) / len(rows)
        most = max(row["peak_bytes"] for row in rows) / 2**30
        lines.append(f"| {name} | {rows[0]['seconds']['decompose']:.1f} | {budgets:.1f} | {most:.2f} |")
    return lines


if __name__ == "__main__":
    main()
