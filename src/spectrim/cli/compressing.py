"""The verbs that make something: calibrate, plan, compress."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.cli.console import progress, quiet, show, stamped, write_results
from spectrim.cli.verbs import Device, Dry, Dtype, Json, Model, Trust, check_results, dtype_of, pairs, verb
from spectrim.settings import EFFORT, CalibrationOptions
from spectrim.settings import effort as effort_of

if TYPE_CHECKING:
    from spectrim.pipeline.budget import Budget


Level = Annotated[
    str, typer.Option("--effort", help="quick, standard or thorough: samples, compensation and end-to-end pass.")
]


@verb(
    "calibrate",
    record=CalibrationOptions,
    after_stop="the same command goes on after the last snapshot in the statistics directory",
)
def _calibrate(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The statistics directory to write or to finish.")],
    options: CalibrationOptions,
    given: dict[str, Any],
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    effort: Level = EFFORT,
    dry_run: Dry = False,
) -> None:
    """Run samples through a model and keep the moments of what its linears read."""
    level = effort_of(effort)
    options = options if "samples" in given else options.model_copy(update={"samples": level.samples})
    options.check_together()
    options.check_effect(given)
    from spectrim.calibrate import calibrate
    from spectrim.calibrate.distributed import joined
    from spectrim.calibrate.forms import CurvatureForm
    from spectrim.calibrate.snapshot import check_home
    from spectrim.checkpoint import load, load_processor, read_config
    from spectrim.checks import check_device, check_directory, check_sources
    from spectrim.demo import resolve
    from spectrim.dense import check_dense

    quiet()
    check_device(device)
    trust = {"trust_remote_code": trust_remote_code}
    check_home(out)
    check_directory(out, "-o")
    check_sources(options.text, options.images)
    for form in options.curvature_forms.values():
        CurvatureForm.read(form)
    source = resolve(model)
    check_dense(read_config(source, trust))
    if dry_run:
        from spectrim.cli.intent import calibration_items, model_item, would

        read, gather, write, _ = calibration_items(source, options, out, dtype=dtype_of(dtype), **trust)
        would([model_item(source), *read], gather, write)
        return
    with progress() as report, joined(device) as own:
        loaded_as: dict[str, Any] = {"device_map": own, "dtype": dtype_of(dtype), **trust}
        processor = load_processor(source, **trust)
        statistics = calibrate(
            load(source, **loaded_as, memory=options.memory),
            out,
            processor=processor,
            progress=lambda done, total: report("calibrate", done, total),
            estimate=True,
            **dict(options),
        )
    manifest = statistics.manifest
    counts = {unit.words: manifest.gathered[unit.name].samples for unit in manifest.units}
    show(f"{statistics.path}: moments of {', '.join(f'{count} {words}' for words, count in counts.items())}")
    if kinds := Counter(manifest.forms.values()):
        forms = ", ".join(f"{count} {form}" for form, count in kinds.items())
        show(f"output moments: {forms}; passes: {sum(map(len, manifest.groups.values()))}")


Size = Annotated[
    list[str] | None, typer.Option(help="The most that the weight files may take, such as 3.5GB or 900MiB; repeatable.")
]
Bits = Annotated[list[float] | None, typer.Option(help="Bits per weight of the linears; repeatable.")]
Tokens = Annotated[int | None, typer.Option(help="Let --size hold the key/value cache of so many tokens, too.")]
Batch = Annotated[int, typer.Option(help="Sequences in the cache of --context.")]
Retain = Annotated[list[float] | None, typer.Option(help="Share of the linears' bytes to keep; repeatable.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change the recipe: key=value.")]
RecipeName = Annotated[str, typer.Option(help="A built-in recipe or a YAML file.")]
Keep = Annotated[
    list[str] | None, typer.Option(help="Keep linears dense whose names match, such as '*.layers.0.*'; repeatable.")
]
Only = Annotated[list[str] | None, typer.Option(help="Compress linears alone whose names match; repeatable.")]


@verb("plan", after_stop="what was decomposed is kept in the statistics directory, and the same command goes on")
def _plan(
    model: Model,
    recipe: RecipeName = "spectrim",
    retain: Retain = None,
    size: Size = None,
    context: Tokens = None,
    batch: Batch = 1,
    bits: Bits = None,
    stats: Annotated[Path | None, typer.Option(help="The statistics directory of the model.")] = None,
    changes: Changes = None,
    keep: Keep = None,
    only: Only = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Make this size and four others, and measure what they cost.")
    ] = False,
    json: Json = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    dry_run: Dry = False,
) -> None:
    """Say what a compression would come to, without making it: bytes and predicted loss by part, and over sizes."""
    from spectrim.checkpoint import load, load_processor
    from spectrim.checks import check_device, check_directory
    from spectrim.cli.console import is_standard
    from spectrim.demo import resolve
    from spectrim.errors import BudgetError, UsageError
    from spectrim.pipeline import job_compression
    from spectrim.pipeline.jobs import check_job
    from spectrim.pipeline.outlook import measurable, outlook

    quiet()
    check_device(device)
    limits = _budgets(size, bits, retain, context, batch)
    if len(limits) != 1:
        raise BudgetError("give one limit, such as --size 3.5GB; plan says what other sizes would come to")
    if json is not None and not is_standard(json):
        if json.exists():
            raise UsageError(f"--json {json} exists; name another file")
        check_directory(json.parent, "--json")
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    source = resolve(model)
    job = check_job(
        source,
        None,
        recipe=recipe,
        changes=_changed(changes, keep, only),
        budgets=limits,
        plan=None,
        stats=stats,
        overwrite=False,
        samples={},
        **trust,
    )
    if job.statistics is None and job.recipe.needs_statistics:
        raise UsageError(
            f"a plan by the recipe '{job.recipe.name}' needs statistics; run `spectrim calibrate`, and give its "
            "directory by --stats"
        )
    if measure:
        measurable(job.recipe, job.statistics)
    if dry_run:
        from spectrim.cli.intent import model_item, path_item, results_items, shapes, would

        job.check_parts(*shapes(source, dtype=dtype_of(dtype), **trust))
        read, write = [model_item(source)], results_items(json)
        if job.statistics is not None:
            read.append(path_item("statistics", job.statistics.path))
            kept = "spectra, options and measurements" if measure else "spectra and options"
            write.insert(0, (f"{kept} in {job.statistics.path}, where they are missing", None))
        would(read, (), write)
        return
    loaded = load(source, device_map=device, dtype=dtype_of(dtype), **trust)
    with (
        progress() as report,
        job_compression(job, loaded, load_processor(source, **trust), report, {}) as prepared,
    ):
        found = outlook(prepared, job.budgets[0], measured=measure)
    show(found.table())
    for line in found.lines():
        show(line)
    write_results(json, found.json())


def _changed(changes: list[str] | None, keep: list[str] | None, only: list[str] | None) -> dict[str, Any]:
    """What the command line changes of the recipe."""
    from spectrim.pipeline.jobs import with_patterns

    return with_patterns(pairs(changes or [], "--set metric.gamma=0.5"), keep, only)


def _budgets(
    size: list[str] | None, bits: list[float] | None, retain: list[float] | None, context: int | None, batch: int
) -> "list[Budget]":
    """The limits of the command line, in the order of the options."""
    from spectrim.pipeline.run import limits

    asked = [
        *((None, None, value) for value in size or []),
        *((None, value, None) for value in bits or []),
        *((value, None, None) for value in retain or []),
    ]
    return [limit for one in asked or [(None, None, None)] for limit in limits(*one, context, batch)]


@verb(
    "compress",
    record=CalibrationOptions,
    after_stop="the same command goes on from what the statistics directory holds, which without --stats is OUT.stats",
)
def _compress(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The checkpoint; with several budgets their parent.")],
    options: CalibrationOptions,
    given: dict[str, Any],
    recipe: RecipeName = "spectrim",
    retain: Retain = None,
    size: Size = None,
    context: Tokens = None,
    batch: Batch = 1,
    bits: Bits = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.json to obey instead of a limit.")] = None,
    stats: Annotated[
        Path | None, typer.Option(help="A statistics directory; else samples are gathered into OUT.stats.")
    ] = None,
    changes: Changes = None,
    keep: Keep = None,
    only: Only = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint that spectrim wrote.")] = False,
    effort: Level = EFFORT,
    json: Json = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    dry_run: Dry = False,
) -> None:
    """Compress a model to one or more budgets and write the checkpoints.

    The options of samples are those of calibrate; gradients and curvature are gathered as the recipe needs them.
    """
    from spectrim.checkpoint import load, load_processor
    from spectrim.checks import check_device
    from spectrim.demo import resolve
    from spectrim.evaluate.footprint import stored_bytes
    from spectrim.pipeline import job_compression
    from spectrim.pipeline.jobs import check_job, gathered, with_effort

    quiet()
    check_device(device)
    check_results(json)
    trust = {"trust_remote_code": trust_remote_code}
    loaded_as: dict[str, Any] = {"device_map": device, "dtype": dtype_of(dtype), **trust}
    source = resolve(model)
    changed, given = with_effort(effort, recipe, _changed(changes, keep, only), given, gathers=stats is None)
    job = check_job(
        source,
        out,
        recipe=recipe,
        changes=changed,
        budgets=_budgets(size, bits, retain, context, batch),
        plan=plan,
        stats=stats,
        overwrite=overwrite,
        samples=given,
        trust_remote_code=trust_remote_code,
    )
    samples = CalibrationOptions.checked(**gathered(job.recipe, given))
    samples.check_effect(given)
    if dry_run:
        from spectrim.cli.intent import compression_items, model_item, results_items, would

        read, gather, write = compression_items(source, job, samples, dtype=dtype_of(dtype), **trust)
        would([model_item(source), *read], gather, [*write, *results_items(json)])
        return
    made = []
    if job.kept is not None:
        show(f"statistics: {job.kept}")
    with (
        progress() as report,
        job_compression(
            job,
            load(source, **loaded_as, memory=samples.memory),
            load_processor(source, **trust),
            report,
            given,
            estimate=True,
        ) as prepared,
    ):
        for item, target in zip(prepared.plans(job), job.targets, strict=True):
            # A processor that is saved by transformers brings its code; a directory's is copied without.
            files = prepared.processor if trust_remote_code else source
            written = prepared.save(item, target, processor=files, overwrite=overwrite)
            record = prepared.provenance(item)["retention"]
            show(
                f"{written}: {item.bytes:,} of {item.dense_bytes:,} bytes of linears ({record['bytes']:.2%}), "
                f"{record['params']:.2%} of their parameters, {record['checkpoint']:.2%} of the whole checkpoint: "
                f"{stored_bytes(written):,} bytes"
            )
            made.append(written)
    if json is not None:
        kept = job.kept if job.statistics is None else job.statistics.path
        write_results(
            json,
            stamped(
                {"statistics": None if kept is None else str(kept), "checkpoints": list(map(_checkpoint_result, made))}
            ),
        )


def _checkpoint_result(written: Path) -> dict[str, Any]:
    """What ``--json`` says of a checkpoint: its place and bytes, and of its record what a user asks for first."""
    from spectrim.checkpoint import read_provenance
    from spectrim.evaluate.footprint import stored_bytes

    record = read_provenance(written)
    kept = {key: record[key] for key in ("limit", "retention", "places", "kept", "predicted_loss")}
    return {"directory": str(written), "bytes": stored_bytes(written), "linears": record["bytes"], **kept}
