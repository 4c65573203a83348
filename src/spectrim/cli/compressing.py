"""The verbs that make something: calibrate, compress."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli.verbs import Device, Dtype, Model, Trust, dtype_of, pairs, progress, quiet, show, verb
from spectrim.settings import CalibrationOptions


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
) -> None:
    """Run samples through a model and keep the moments of what its linears read."""
    options.check_together()
    options.check_effect(given)
    from spectrim.calibrate import calibrate
    from spectrim.calibrate.forms import CurvatureForm
    from spectrim.calibrate.snapshot import check_home
    from spectrim.checkpoint import load, load_processor, read_config
    from spectrim.checks import check_device, check_directory, check_sources
    from spectrim.demo import resolve
    from spectrim.dense import check_dense

    quiet()
    check_device(device)
    trust = {"trust_remote_code": trust_remote_code}
    loaded_as: dict[str, Any] = {"device_map": device, "dtype": dtype_of(dtype), **trust}
    check_home(out)
    check_directory(out, "-o")
    check_sources(options.text, options.images)
    for form in options.curvature_forms.values():
        CurvatureForm.read(form)
    source = resolve(model)
    check_dense(read_config(source, trust))
    with progress() as report:
        processor = load_processor(source, **trust)
        statistics = calibrate(
            load(source, **loaded_as),
            out,
            processor=processor,
            progress=lambda done, total: report("calibrate", done, total),
            **dict(options),
        )
    manifest = statistics.manifest
    counts = ", ".join(f"{manifest.gathered[unit.name].samples} {unit.words}" for unit in manifest.units)
    show(f"{statistics.path}: moments of {counts}")
    if kinds := Counter(manifest.forms.values()):
        forms = ", ".join(f"{count} {form}" for form, count in kinds.items())
        show(f"output moments: {forms}; gradient passes of each modality: {len(manifest.groups)}")


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
    recipe: Annotated[str, typer.Option(help="A built-in recipe or a YAML file.")] = "spectrim",
    retain: Annotated[list[float] | None, typer.Option(help="Share of the linears' bytes to keep; repeatable.")] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="The most that the weight files may take, such as 3.5GB or 900MiB; repeatable."),
    ] = None,
    bits: Annotated[list[float] | None, typer.Option(help="Bits per weight of the linears; repeatable.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.json to obey instead of a limit.")] = None,
    stats: Annotated[
        Path | None, typer.Option(help="A statistics directory; else samples are gathered into OUT.stats.")
    ] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe: key=value.")] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Keep linears dense whose names match, such as '*.layers.0.*'; repeatable.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Compress linears alone whose names match; repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint that spectrim wrote.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compress a model to one or more budgets and write the checkpoints.

    The options of samples are those of calibrate; gradients and curvature are gathered as the recipe needs them.
    """
    from spectrim.checkpoint import load, load_processor
    from spectrim.checks import check_device
    from spectrim.demo import resolve
    from spectrim.evaluate.footprint import stored_bytes
    from spectrim.pipeline import job_compression
    from spectrim.pipeline.budget import Budget
    from spectrim.pipeline.jobs import check_job, gathered, with_patterns

    quiet()
    check_device(device)
    trust = {"trust_remote_code": trust_remote_code}
    loaded_as: dict[str, Any] = {"device_map": device, "dtype": dtype_of(dtype), **trust}
    source = resolve(model)
    job = check_job(
        source,
        out,
        recipe=recipe,
        changes=with_patterns(pairs(changes or [], "--set metric.gamma=0.5"), keep, only),
        budgets=[
            *(Budget(size=value) for value in size or []),
            *(Budget(bits=value) for value in bits or []),
            *(Budget(retain=value) for value in retain or []),
        ],
        plan=plan,
        stats=stats,
        overwrite=overwrite,
        samples=given,
        trust_remote_code=trust_remote_code,
    )
    CalibrationOptions.checked(**gathered(job.recipe, given)).check_effect(given)
    if job.kept is not None:
        show(f"statistics: {job.kept}")
    with (
        progress() as report,
        job_compression(job, load(source, **loaded_as), load_processor(source, **trust), report, given) as prepared,
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
