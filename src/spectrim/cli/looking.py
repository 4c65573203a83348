"""The verbs that look: anatomy, recipes, inspect."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from spectrim.cli.console import progress, quiet, show, stamped, write_results
from spectrim.cli.verbs import Device, Dry, Dtype, Json, Model, Trust, check_results, dtype_of, verb


@verb("anatomy", after_stop="nothing was written")
def _anatomy(model: Model, json: Json = None, trust_remote_code: Trust = False, dry_run: Dry = False) -> None:
    """Print what a model is made of: tower, connector, backbone, linears by role, and what is kept dense."""
    from spectrim.anatomy import anatomy
    from spectrim.checkpoint import load
    from spectrim.demo import resolve
    from spectrim.linear import PLACES

    quiet()
    check_results(json)
    source = resolve(model)
    if dry_run:
        from spectrim.cli.intent import model_item, results_items, shapes, would

        shapes(source, dtype=None, trust_remote_code=trust_remote_code)
        would([model_item(source)], write=results_items(json))
        return
    parts = anatomy(load(source, trust_remote_code=trust_remote_code))
    show(
        f"tower: {parts.tower or '–'}   connector: {', '.join(parts.connector) or '–'}   "
        f"backbone: {parts.backbone or '(the whole model)'}"
    )
    rows = Table("place", "role", "shape", "heads", "count", "parameters", box=None, pad_edge=False)
    for row in parts.describe():
        shape = f"{row.out_features} × {row.in_features}"
        rows.add_row(row.place, row.role, shape, str(row.heads or "–"), str(row.count), f"{row.params:,}")
    show(rows)
    places = ", ".join(f"{place} {parts.params(place):,} in {len(parts.blocks(place))} blocks" for place in PLACES)
    show(f"compressible parameters: {places}")
    kept = Table("kept as it is", "parameters", "share", "why", box=None, pad_edge=False)
    for item in parts.kept:
        kept.add_row(item.name, f"{item.params:,}", f"{parts.share(item):.1%}", item.reason)
    show(kept)
    if json is not None:
        groups = [asdict(group) for group in parts.describe()]
        blocks = {place: len(parts.blocks(place)) for place in PLACES}
        linears = [asdict(linear) | {"dtype": str(linear.dtype).removeprefix("torch.")} for linear in parts.linears]
        whole = {"tower": parts.tower, "connector": parts.connector, "backbone": parts.backbone, "blocks": blocks}
        rest = {"groups": groups, "linears": linears, "kept": [asdict(item) for item in parts.kept]}
        write_results(json, stamped({"model": model, **whole, **rest}))


@verb("recipes", after_stop="nothing was written", runs=False)
def _recipes(json: Json = None) -> None:
    """List the built-in recipes."""
    from spectrim.recipe import Recipe, builtin_names

    check_results(json)
    rows = Table("recipe", "what it does", "paper", box=None, pad_edge=False)
    recipes = [Recipe.read(name) for name in builtin_names()]
    for recipe in recipes:
        rows.add_row(recipe.name, recipe.summary, recipe.paper)
    show(rows)
    if json is not None:
        write_results(json, stamped({"recipes": [recipe.model_dump(mode="json") for recipe in recipes]}))


@verb("inspect", after_stop="nothing was written, and the same command starts again")
def _inspect(
    model: Model,
    stats: Annotated[Path, typer.Option(help="The statistics directory of the model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The directory for inspection.json and the plots.")],
    retain: Annotated[float, typer.Option(help="The retention at which modalities are compared.")] = 0.4,
    plots: Annotated[bool, typer.Option(help="Draw plots (needs the extra 'report').")] = True,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    dry_run: Dry = False,
) -> None:
    """Show how far text-only whitening is from what images need, layer by layer."""
    from spectrim.calibrate import Statistics
    from spectrim.checkpoint import load, read_config
    from spectrim.checks import check_device, check_directory, check_retain
    from spectrim.demo import resolve
    from spectrim.dense import check_dense
    from spectrim.mismatch.analysis import check_text, inspect
    from spectrim.mismatch.writing import check_plots, write

    quiet()
    check_device(device)
    loaded_as: dict[str, Any] = {"device_map": device, "dtype": dtype_of(dtype), "trust_remote_code": trust_remote_code}
    check_retain(retain)
    check_directory(out, "-o")
    if plots:
        check_plots()
    statistics, source = Statistics.open(stats), resolve(model)
    check_text(statistics)
    check_dense(read_config(source, {"trust_remote_code": trust_remote_code}))
    if dry_run:
        from spectrim.cli.intent import model_item, path_item, would

        shown = ["inspection.json", *(["plots"] if plots else [])]
        would([model_item(source), path_item("statistics", stats)], (), [(f"{' and '.join(shown)} in {out}", None)])
        return
    with progress() as report:
        inspection = inspect(
            load(source, **loaded_as),
            statistics,
            retain=retain,
            progress=lambda done, total: report("inspect", done, total),
        )
    for path in write(inspection, out, plots=plots):
        show(str(path))
