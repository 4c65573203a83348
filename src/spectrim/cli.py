"""The command line: one thin function per verb."""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from spectrim import demo as demo_room
from spectrim.anatomy import PLACES, anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.checkpoint import add_results, load, load_processor, push
from spectrim.errors import BudgetError, RecipeError, SampleError, SpectrimError
from spectrim.evaluate import costs, evaluate, losses, markdown, table
from spectrim.evaluate.harnesses import run_suite
from spectrim.evaluate.suites import Suite, suite_table
from spectrim.inspect_ import inspect, write
from spectrim.pipeline import compression
from spectrim.plan import Plan
from spectrim.recipe import Recipe, builtin_names

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Labels(StrEnum):
    """Whose labels gradient passes use."""

    given = "given"
    sampled = "sampled"


Model = Annotated[str, typer.Argument(help="A model directory, a hub id, a .gguf file, or 'demo'.")]
Text = Annotated[str, typer.Option(help="A .txt, .md or .jsonl file, a dataset id, 'builtin' or 'none'.")]
Images = Annotated[str, typer.Option(help="A folder, a .jsonl file, a dataset id, 'builtin' or 'none'.")]
Samples = Annotated[int, typer.Option(help="Samples of each modality.")]
Seqlen = Annotated[int, typer.Option(help="Tokens of a text sample.")]
Seed = Annotated[int, typer.Option(help="Chooses the samples.")]
Device = Annotated[str | None, typer.Option(help="Where the model runs, such as cpu or cuda:0.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the files' own if not given.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings; only if you have read it.")
]


def _console() -> Console:
    """Tables need 120 columns; a pipe or a narrow terminal gets them all the same."""
    console = Console()
    return console if console.width >= 120 else Console(width=120)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left for each stage; on standard error, so that results can be piped."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        stages: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total, visible=done < total)

        yield report


def _dtype(name: str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise typer.BadParameter(f"'{name}' is not one of {', '.join(known)}", param_hint="--dtype")
    return None if name is None else known[name]


def _source(name: str) -> str | None:
    return None if name == "none" else name


def _settings(values: list[str], example: str = "--set metric.gamma=0.5") -> dict[str, Any]:
    """``key=value`` pairs; values are read as YAML, so numbers are numbers."""
    option = example.split()[0]
    pairs = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals:
            raise RecipeError(f"{option} {value} has no value; write it as {example}")
        try:
            pairs[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{option} {value} has a value that is no YAML; quote it") from error
    return pairs


@app.command("anatomy")
def _anatomy(model: Model, trust_remote_code: Trust = False) -> None:
    """Print what a model is made of: tower, connector, backbone, linears by role, and what is kept dense."""
    parts = anatomy(load(demo_room.resolve(model), trust_remote_code=trust_remote_code))
    console = _console()
    console.print(f"tower: {parts.tower or '–'}   connector: {', '.join(parts.connector) or '–'}   ", end="")
    console.print(f"backbone: {parts.backbone or '(the whole model)'}")
    rows = Table("place", "role", "shape", "heads", "count", "parameters", box=None, pad_edge=False)
    for row in parts.describe():
        shape = f"{row.out_features} × {row.in_features}"
        rows.add_row(row.place, row.role, shape, str(row.heads or "–"), str(row.count), f"{row.params:,}")
    console.print(rows)
    places = ", ".join(f"{place} {parts.params(place):,} in {len(parts.blocks(place))} blocks" for place in PLACES)
    console.print(f"compressible parameters: {places}")
    kept = Table("kept as it is", "parameters", "why", box=None, pad_edge=False)
    for item in parts.kept:
        kept.add_row(item.name, f"{item.params:,}", item.reason)
    console.print(kept)


@app.command("recipes")
def _recipes() -> None:
    """List the built-in recipes."""
    rows = Table("recipe", "what it does", "paper", box=None, pad_edge=False)
    for name in builtin_names():
        recipe = Recipe.read(name)
        rows.add_row(recipe.name, recipe.summary, recipe.paper)
    _console().print(rows)


@app.command("calibrate")
def _calibrate(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The statistics directory to write or to finish.")],
    text: Text = "builtin",
    images: Images = "builtin",
    samples: Samples = 128,
    seqlen: Seqlen = 128,
    batch_size: Annotated[int, typer.Option(help="Samples that run together.")] = 8,
    seed: Seed = 0,
    instruction: Annotated[str, typer.Option(help="Asked of images that bring none.")] = "Describe this image.",
    image_tokens_only: Annotated[bool, typer.Option(help="Count only image tokens in the backbone.")] = False,
    gradients: Annotated[bool, typer.Option(help="Gather gradients of text as well (fwsvd needs them).")] = False,
    curvature: Annotated[
        bool, typer.Option(help="Gather output gradients as well (spectrim, laser and curvature need them).")
    ] = True,
    labels: Annotated[
        Labels, typer.Option(help="Of gradients: the samples' own tokens, or drawn from the model (true Fisher).")
    ] = Labels.given,
    answer_tokens: Annotated[int, typer.Option(help="Of an answer that the model draws for an image, at most.")] = 32,
    curvature_gib: Annotated[float, typer.Option(help="Memory for output moments of one modality and pass.")] = 8.0,
    curvature_passes: Annotated[int, typer.Option(help="Gradient passes that may share the linears.")] = 1,
    curvature_form: Annotated[
        list[str] | None, typer.Option(help="Form of a role's output moments, such as gate=sketch:256; repeatable.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Run samples through a model and keep the moments of what its linears read."""
    source = demo_room.resolve(model)
    with _progress() as report:
        statistics = calibrate(
            load(source, device_map=device, dtype=_dtype(dtype), trust_remote_code=trust_remote_code),
            out,
            processor=load_processor(source, trust_remote_code=trust_remote_code),
            text=_source(text),
            images=_source(images),
            samples=samples,
            seqlen=seqlen,
            batch_size=batch_size,
            seed=seed,
            instruction=instruction,
            image_tokens_only=image_tokens_only,
            gradients=gradients,
            curvature=curvature,
            labels=labels.value,
            answer_tokens=answer_tokens,
            curvature_gib=curvature_gib,
            curvature_passes=curvature_passes,
            curvature_forms=_settings(curvature_form or [], "--curvature-form gate=sketch:256"),
            progress=lambda done, total: report("calibrate", done, total),
        )
    manifest = statistics.manifest
    counts = ", ".join(f"{manifest.gathered[unit.name].samples} {unit.words}" for unit in manifest.units)
    _console().print(f"{statistics.path}: moments of {counts}")
    if kinds := Counter(manifest.forms.values()):
        forms = ", ".join(f"{count} {form}" for form, count in kinds.items())
        _console().print(f"output moments: {forms}; gradient passes of each modality: {len(manifest.groups)}")


@app.command("compress")
def _compress(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The checkpoint; with several budgets their parent.")],
    recipe: Annotated[str, typer.Option(help="A built-in recipe or a YAML file.")] = "spectrim",
    retain: Annotated[list[float] | None, typer.Option(help="Share of the linears' bytes to keep; repeatable.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.json to obey instead of a budget.")] = None,
    stats: Annotated[Path | None, typer.Option(help="A statistics directory; else samples are gathered.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe: key=value.")] = None,
    text: Text = "builtin",
    images: Images = "builtin",
    samples: Samples = 128,
    seqlen: Seqlen = 128,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace what OUT holds.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compress a model to one or more budgets and write the checkpoints."""
    budgets = retain or []
    if bool(budgets) == (plan is not None):
        raise BudgetError("give either a budget, such as --retain 0.6, or --plan plan.json")
    source = demo_room.resolve(model)
    with (
        _progress() as report,
        compression(
            load(source, device_map=device, dtype=_dtype(dtype), trust_remote_code=trust_remote_code),
            recipe,
            stats=stats,
            processor=load_processor(source, trust_remote_code=trust_remote_code),
            changes=_settings(changes or []),
            progress=report,
            text=_source(text),
            images=_source(images),
            samples=samples,
            seqlen=seqlen,
            seed=seed,
        ) as prepared,
    ):
        plans = [prepared.plan(budget) for budget in budgets] or [Plan.read(str(plan), prepared.parts)]
        targets = [out] if len(plans) == 1 else [out / f"retain-{item.retain}" for item in plans]
        for item, target in zip(plans, targets, strict=True):
            # A processor that is saved by transformers brings its code; a directory's is copied without.
            files = prepared.processor if trust_remote_code else source
            written = prepared.save(item, target, processor=files, overwrite=overwrite)
            record = prepared.provenance(item)["retention"]
            _console().print(
                f"{written}: {item.bytes:,} of {item.dense_bytes:,} bytes of linears ({record['bytes']:.2%}), "
                f"{record['params']:.2%} of their parameters, {record['checkpoint']:.2%} of the whole checkpoint"
            )


@app.command("inspect")
def _inspect(
    model: Model,
    stats: Annotated[Path, typer.Option(help="The statistics directory of the model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The directory for inspection.json and the plots.")],
    retain: Annotated[float, typer.Option(help="The retention at which modalities are compared.")] = 0.4,
    plots: Annotated[bool, typer.Option(help="Draw plots (needs the extra 'report').")] = True,
    trust_remote_code: Trust = False,
) -> None:
    """Show how far text-only whitening is from what images need, layer by layer."""
    with _progress() as report:
        found = inspect(
            load(demo_room.resolve(model), trust_remote_code=trust_remote_code),
            Statistics.open(stats),
            retain=retain,
            progress=lambda done, total: report("inspect", done, total),
        )
    for path in write(found, out, plots=plots):
        _console().print(str(path))


@app.command("evaluate")
def _evaluate(
    models: Annotated[list[str], typer.Argument(help="Model directories, or 'demo'; the dense one first.")],
    tasks: Annotated[str, typer.Option(help="perplexity, vqa, or both with a comma.")] = "perplexity,vqa",
    text: Annotated[str, typer.Option(help="Text for perplexity, as for calibrate.")] = "builtin",
    questions: Annotated[
        str, typer.Option(help="'builtin', or a .jsonl file with image, question, answer.")
    ] = "builtin",
    samples: Annotated[int, typer.Option(help="Questions of each task.")] = 100,
    seqlen: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; as long as the window if absent.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of text to read at most.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples that run together.")] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    suite: Annotated[
        str | None, typer.Option(help="Benchmarks of a paper in place of tasks: adasvd, jw-svd or a .yaml file.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Samples of each task of a suite at most.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results here too.")] = None,
    card: Annotated[bool, typer.Option(help="Write them into the card of each compressed checkpoint too.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Measure language and sight of models, and what each lost against the dense one."""
    if suite is not None:
        if card:
            raise SampleError("a card holds the results of --tasks, not those of a suite; leave --card or --suite out")
        chosen, paths = Suite.read(suite), [demo_room.resolve(model) for model in models]
        scored = run_suite(
            chosen,
            paths,
            limit=limit,
            batch_size=batch_size,
            device=device,
            dtype=_dtype(dtype),
            trust_remote_code=trust_remote_code,
        )
        _console().print(suite_table(scored))
        if json is not None:
            scored.write(json)
            _console().print(f"results: {json}")
        return
    with _progress() as report:
        found = evaluate(
            [demo_room.resolve(model) for model in models],
            tasks=tuple(tasks.split(",")),
            text=text,
            vqa_source=questions,
            samples=samples,
            seed=seed,
            seqlen=seqlen,
            stride=stride,
            max_tokens=max_tokens,
            batch_size=batch_size,
            device=device,
            dtype=_dtype(dtype),
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    _console().print(table(found))
    _console().print(costs(found))
    if (predicted := losses(found)) is not None:
        _console().print(predicted)
    if json is not None:
        found.write(json)
        _console().print(f"results: {json}")
    for result in found.results if card else ():
        if result.compressed:
            _console().print(f"card: {add_results(result.directory, markdown(found, result))}")


@app.command("push")
def _push(
    checkpoint: Annotated[Path, typer.Argument(help="A directory that spectrim compress wrote.")],
    repo_id: Annotated[str, typer.Argument(help="Where it goes on the Hugging Face hub: owner/name.")],
    private: Annotated[bool, typer.Option(help="Make the repository a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to write to; the main one if not given.")] = None,
) -> None:
    """Upload a checkpoint, with its card, to the Hugging Face hub."""
    _console().print(push(checkpoint, repo_id, private=private, revision=revision))


@app.command("demo")
def _demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where checkpoints and results go.")] = Path("spectrim-demo"),
    samples: Annotated[int, typer.Option(help="Questions of each task.")] = 40,
) -> None:
    """Compress the built-in model by LASER, JW-SVD and text-only baselines, and show what each kept."""
    from spectrim.demo.show import show

    with _progress() as report:
        result = show(out, samples=samples, progress=report)
    console = _console()
    console.print(table(result.report))
    if (predicted := losses(result.report)) is not None:
        console.print(predicted)
    console.print(result.answers)
    console.print(f"checkpoints: {', '.join(str(path) for path in result.checkpoints)}")
    console.print(f"statistics:  {result.statistics}\nresults:     {result.results}")
    console.print(f"{result.seconds:.0f} seconds in all")


def main() -> None:
    """Entry point: the user's mistakes are one line on standard error and exit code 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        app()
    except SpectrimError as error:
        print(f"spectrim: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except OSError as error:
        print(f"spectrim: {error}; check the path and the free space", file=sys.stderr)
        raise SystemExit(2) from error
