"""The verbs that measure: evaluate, bench, pareto, report, demo."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.cli.console import progress, quiet, show, write_results
from spectrim.cli.verbs import Device, Dry, Dtype, Json, Trust, check_results, dtype_of, pairs, refuse, verb
from spectrim.errors import SampleError, UsageError
from spectrim.settings import TASKS, EvaluationOptions

if TYPE_CHECKING:
    from spectrim.cli.intent import Item

_NOT_OF_SUITES = tuple(name for name in EvaluationOptions.model_fields if name != "batch_size")


@verb("evaluate", record=EvaluationOptions, after_stop="no results were written, and the same command starts again")
def _evaluate(
    ctx: typer.Context,
    models: Annotated[
        list[str], typer.Argument(help="Model directories, hub ids, .gguf files or 'demo'; the dense one first.")
    ],
    options: EvaluationOptions,
    given: dict[str, Any],
    device: Device = None,
    dtype: Dtype = None,
    suite: Annotated[
        str | None, typer.Option(help="Benchmarks of a paper in place of tasks: adasvd, jw-svd or a .yaml file.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Samples of each task of a suite at most.")] = None,
    json: Json = None,
    card: Annotated[bool, typer.Option(help="Write them into the card of each compressed checkpoint too.")] = False,
    trust_remote_code: Trust = False,
    dry_run: Dry = False,
) -> None:
    """Measure perplexity and VQA accuracy of models, and their differences to the dense one."""
    if suite is None:
        refuse(ctx, ["limit"], "without --suite")
        options.check_together()
        options.check_effect(given)
    elif card:
        raise SampleError("a card holds the results of --tasks, not those of a suite; leave --card or --suite out")
    else:
        refuse(ctx, _NOT_OF_SUITES, "on a suite, which has its own tasks and samples")
    from spectrim.cli.intent import model_item, results_items, would
    from spectrim.demo import resolve
    from spectrim.evaluate.running import check_evaluation, evaluate, is_compressed

    quiet()
    check_results(json)
    paths = [resolve(model) for model in models]
    how: dict[str, Any] = {"device": device, "dtype": dtype_of(dtype), "trust_remote_code": trust_remote_code}
    if suite is not None:
        _run_suite(suite, paths, json, limit=limit, batch_size=options.batch_size, dry_run=dry_run, **how)
        return
    if card and not any(is_compressed(Path(path)) for path in paths):
        raise UsageError("--card has no effect, since no model is a compressed one; leave it out, or name one that is")
    from spectrim.checkpoint import add_results
    from spectrim.evaluate import costs, divergences, losses, markdown, remarks, table

    if dry_run:
        check_evaluation(paths, options, device=device, trusted=trust_remote_code)
        cards = [(f"the card of {path}", None) for path in paths if card and is_compressed(Path(path))]
        would([*map(model_item, paths), *_evaluated(options)], (), [*results_items(json), *cards])
        return
    with progress() as report:
        results = evaluate(paths, progress=report, **how, **dict(options))
    show(table(results))
    show(costs(results))
    if (predicted := losses(results)) is not None:
        show(predicted)
    if (differing := divergences(results)) is not None:
        show(differing)
    for remark in remarks(results):
        show(remark)
    write_results(json, results.to_json())
    for result in results.results if card else ():
        if result.compressed:
            show(f"card: {add_results(result.directory, markdown(results, result))}")


def _evaluated(options: EvaluationOptions) -> "list[Item]":
    """The sources that tasks of an evaluation read."""
    from spectrim.cli.intent import source_items

    reads = {"text": bool({"perplexity", "kl"} & {*options.tasks}), "questions": "vqa" in options.tasks}
    return source_items(**{kind: getattr(options, kind) for kind, used in reads.items() if used})


def _run_suite(suite: str, paths: list[str], json: Path | None, *, dry_run: bool, **how: Any) -> None:
    from spectrim.cli.intent import model_item, results_items, would
    from spectrim.evaluate.harnesses import check_run, run_suite
    from spectrim.evaluate.suites import Suite, suite_table

    chosen = Suite.read(suite)
    if dry_run:
        check_run(chosen, paths, limit=how["limit"], batch_size=how["batch_size"], device=how["device"])
        tasks = f"the data sets of {', '.join(chosen.tasks)}, from the Hugging Face hub or its cache here"
        would([*map(model_item, paths), (tasks, None)], (), results_items(json))
        return
    scored = run_suite(chosen, paths, **how)
    show(suite_table(scored))
    write_results(json, scored.json())


@verb("bench", after_stop="no results were written, and the same command starts again")
def _bench(
    models: Annotated[
        list[str], typer.Argument(help="Model directories, hub ids, .gguf files or 'demo'; the dense one first.")
    ],
    batch: Annotated[str, typer.Option(help="Prompts that run together; several by commas.")] = "1",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    image: Annotated[bool, typer.Option("--image", help="Time to the first token after an image, too.")] = False,
    context: Annotated[int | None, typer.Option(help="Time a step with so many tokens in the cache, too.")] = None,
    latent_cache: Annotated[
        bool, typer.Option("--latent-cache", help="Run models with keys and values by head with latent caches, too.")
    ] = False,
    engine: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    runtime: Annotated[
        str | None, typer.Option(help="Of integers: auto, speed, memory or reference; else as the checkpoint says.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Turns that count.")] = 5,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json: Json = None,
    dry_run: Dry = False,
) -> None:
    """Measure latency, tokens per second, bytes and memory of models, side by side."""
    if not all(part.strip().isdecimal() for part in batch.split(",")):
        raise UsageError(f"--batch {batch} is no list of numbers; write it as --batch 1,8")
    from spectrim.bench import bench
    from spectrim.bench.measure import check_bench
    from spectrim.demo import resolve

    quiet()
    check_results(json)
    paths, batches = [resolve(model) for model in models], [int(part) for part in batch.split(",")]
    turns: dict[str, Any] = {"prompt": prompt, "new": new, "repeats": repeats, "context": context, "device": device}
    if dry_run:
        from spectrim.checkpoint import read_config
        from spectrim.cli.intent import model_item, results_items, would

        check_bench(models, batches, **turns)
        for path in paths:
            read_config(path, {"trust_remote_code": trust_remote_code})
        dtype_of(dtype)
        would([model_item(path) for path in paths], (), results_items(json))
        return
    with progress() as report:
        found = bench(
            paths,
            names=models,
            engine=engine,
            batches=batches,
            image=image,
            latent_cache=latent_cache,
            dtype=dtype_of(dtype),
            runtime=runtime,
            trust_remote_code=trust_remote_code,
            progress=report,
            **turns,
        )
    show(found.table())
    write_results(json, found.json())


@verb(
    "pareto",
    record=EvaluationOptions,
    after_stop="checkpoints that are finished stay, and the same command goes on with the others",
)
def _pareto(
    model: Annotated[str, typer.Argument(help="The directory of a dense model, or 'demo'.")],
    stats: Annotated[Path, typer.Option(help="The statistics directory of the model.")],
    sizes: Annotated[str, typer.Option(help="Of all files, such as 6MB, or of the linears, such as 40%; by commas.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The directory for checkpoints and results.json.")],
    options: EvaluationOptions,
    given: dict[str, Any],
    recipes: Annotated[str, typer.Option(help="Built-in recipes or YAML files; several by commas.")] = "spectrim",
    changes: Annotated[list[str] | None, typer.Option("--set", help="Change the recipes: key=value.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    dry_run: Dry = False,
) -> None:
    """Compress a model by several recipes to several sizes, evaluate and time all, and compare them."""
    from spectrim.pipeline import pareto
    from spectrim.pipeline.trials import RESULTS, trials

    quiet()
    by_itself = {} if "tasks" in given else {"tasks": TASKS}
    options.model_copy(update=by_itself).check_effect(given)
    what: dict[str, Any] = {
        "stats": stats,
        "sizes": sizes.split(","),
        "recipes": recipes.split(","),
        "changes": pairs(changes or [], "--set metric.gamma=0.5"),
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    as_dtype = dtype_of(dtype)
    if dry_run:
        from spectrim.cli.intent import model_item, path_item, would

        asked = trials(model, out, evaluation=given, **what)
        made: list[Item] = [(f"the checkpoint {trial.target}", None) for trial in asked.trials if not trial.finished()]
        reads = [model_item(asked.source), path_item("statistics", stats), *_evaluated(asked.options)]
        would(reads, (), [*made, (f"the results {out / RESULTS}", None)])
        return
    with progress() as report:
        found = pareto(model, out, dtype=as_dtype, progress=report, **what, **given)
    show(found.table())
    for line in found.lines():
        show(line)
    show(f"results: {out / RESULTS}")


@verb("report", after_stop="no page was written, and the same command starts again")
def _report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Of evaluate, pareto or bench: results.json; checkpoints; statistics directories."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page.")],
    model: Annotated[str | None, typer.Option(help="The dense model of the statistics, if no results name it.")] = None,
    dry_run: Dry = False,
) -> None:
    """Write one HTML page that shows results, without anything from the network."""
    from spectrim.report import report

    quiet()
    if dry_run:
        from spectrim.cli.intent import path_item, would
        from spectrim.report.writing import check_report

        check_report(results, out, model=model)
        would([path_item("results of", path) for path in results], (), [(f"the page {out}", None)])
        return
    with progress() as bars:
        path = report(results, out, model=model, progress=bars)
    show(f"page: {path}")


@verb("demo", after_stop="the same command goes on from what it has made so far")
def _demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where checkpoints and results go.")] = Path("spectrim-demo"),
    samples: Annotated[int, typer.Option(help="Questions of each task.")] = 40,
    device: Device = None,
    dtype: Dtype = None,
    dry_run: Dry = False,
) -> None:
    """Compress the built-in model by spectrim, LASER, JW-SVD and text-only baselines, and compare the results."""
    from spectrim.demonstration import SAMPLES, check
    from spectrim.demonstration import show as run

    quiet()
    if dry_run:
        from spectrim.cli.intent import model_item, source_items, would
        from spectrim.demo import resolve

        read = [model_item(resolve("demo")), *source_items(text="builtin", images="builtin", questions="builtin")]
        places = [("statistics", out / "statistics"), *(("the checkpoint", target) for target in check(out, samples))]
        places += [("the results", out / "results.json")]
        gather = [f"moments and gradients of {SAMPLES} text and {SAMPLES} image samples"]
        would(read, gather, [(f"{words} {path}", None) for words, path in places])
        return
    with progress() as report:
        result = run(out, samples=samples, device=device, dtype=dtype_of(dtype), progress=report)
    show(result.table())
    show(result.lesson())
    show(f"checkpoints: {out}, such as {result.checkpoints[0]}")
    show(f"statistics:  {result.statistics}\nresults:     {result.results}")
    show(f"page:        {result.page if result.hint is None else f'none, since {result.hint}'}")
    show(f"{result.seconds:.0f} seconds in all")
