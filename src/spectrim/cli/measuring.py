"""The verbs that measure: evaluate, bench, demo."""

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli.verbs import Device, Dtype, Trust, dtype_of, progress, quiet, refuse, show, verb
from spectrim.errors import SampleError, UsageError
from spectrim.settings import EvaluationOptions

_NOT_OF_SUITES = tuple(name for name in EvaluationOptions.model_fields if name != "batch_size")


@verb("evaluate", record=EvaluationOptions, after_stop="no results were written, and the same command starts again")
def _evaluate(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Model directories, or 'demo'; the dense one first.")],
    options: EvaluationOptions,
    given: dict[str, Any],
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
    """Measure perplexity and VQA accuracy of models, and their differences to the dense one."""
    if suite is None:
        refuse(context, ["limit"], "without --suite")
        options.check_together()
        options.check_effect(given)
    elif card:
        raise SampleError("a card holds the results of --tasks, not those of a suite; leave --card or --suite out")
    else:
        refuse(context, _NOT_OF_SUITES, "on a suite, which has its own tasks and samples")
    from spectrim.checks import check_file
    from spectrim.demo import resolve
    from spectrim.evaluate.running import evaluate, is_compressed

    quiet()
    if json is not None:
        check_file(json, "--json")
    paths = [resolve(model) for model in models]
    how: dict[str, Any] = {"device": device, "dtype": dtype_of(dtype), "trust_remote_code": trust_remote_code}
    if suite is not None:
        _run_suite(suite, paths, json, limit=limit, batch_size=options.batch_size, **how)
        return
    if card and not any(is_compressed(Path(path)) for path in paths):
        raise UsageError("--card has no effect, since no model is a compressed one; leave it out, or name one that is")
    from spectrim.checkpoint import add_results
    from spectrim.evaluate import costs, divergences, losses, markdown, remarks, table

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
    if json is not None:
        results.write(json)
        show(f"results: {json}")
    for result in results.results if card else ():
        if result.compressed:
            show(f"card: {add_results(result.directory, markdown(results, result))}")


def _run_suite(suite: str, paths: list[str], json: Path | None, **how: Any) -> None:
    from spectrim.evaluate.harnesses import run_suite
    from spectrim.evaluate.suites import Suite, suite_table

    scored = run_suite(Suite.read(suite), paths, **how)
    show(suite_table(scored))
    if json is not None:
        scored.write(json)
        show(f"results: {json}")


@verb("bench", after_stop="no results were written, and the same command starts again")
def _bench(
    models: Annotated[list[str], typer.Argument(help="Model directories, or 'demo'; the dense one first.")],
    batch: Annotated[str, typer.Option(help="Prompts that run together; several by commas.")] = "1",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    image: Annotated[bool, typer.Option("--image", help="Time to the first token after an image, too.")] = False,
    cached: Annotated[
        int | None, typer.Option("--context", help="Time a step with so many tokens in the cache, too.")
    ] = None,
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
    json: Annotated[Path | None, typer.Option(help="Write the results here too.")] = None,
) -> None:
    """Measure latency, tokens per second, bytes and memory of models, side by side."""
    if not all(part.strip().isdecimal() for part in batch.split(",")):
        raise UsageError(f"--batch {batch} is no list of numbers; write it as --batch 1,8")
    from spectrim.bench import bench
    from spectrim.checks import check_file
    from spectrim.demo import resolve

    quiet()
    if json is not None:
        check_file(json, "--json")
    with progress() as report:
        found = bench(
            [resolve(model) for model in models],
            names=models,
            engine=engine,
            batches=[int(part) for part in batch.split(",")],
            prompt=prompt,
            new=new,
            image=image,
            context=cached,
            latent_cache=latent_cache,
            repeats=repeats,
            device=device,
            dtype=dtype_of(dtype),
            runtime=runtime,
            progress=report,
        )
    show(found.table())
    if json is not None:
        found.write(json)
        show(f"results: {json}")


@verb("demo", after_stop="the same command goes on from what it has made so far")
def _demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where checkpoints and results go.")] = Path("spectrim-demo"),
    samples: Annotated[int, typer.Option(help="Questions of each task.")] = 40,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compress the built-in model by spectrim, LASER, JW-SVD and text-only baselines, and compare the results."""
    from spectrim.demonstration import show as run
    from spectrim.evaluate import losses, table

    quiet()
    with progress() as report:
        result = run(out, samples=samples, device=device, dtype=dtype_of(dtype), progress=report)
    show(table(result.report))
    if (predicted := losses(result.report)) is not None:
        show(predicted)
    show(result.answers)
    show(f"checkpoints: {', '.join(str(path) for path in result.checkpoints)}")
    show(f"statistics:  {result.statistics}\nresults:     {result.results}")
    show(f"{result.seconds:.0f} seconds in all")
