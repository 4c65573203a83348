"""The verbs that look: anatomy, recipes, inspect."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from spectrim.cli.verbs import Device, Dtype, Model, Trust, dtype_of, progress, quiet, show, verb


@verb("anatomy", after_stop="nothing was written")
def _anatomy(model: Model, trust_remote_code: Trust = False) -> None:
    """Print what a model is made of: tower, connector, backbone, linears by role, and what is kept dense."""
    from spectrim.anatomy import anatomy
    from spectrim.checkpoint import load
    from spectrim.demo import resolve
    from spectrim.linear import PLACES

    quiet()
    parts = anatomy(load(resolve(model), trust_remote_code=trust_remote_code))
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
    kept = Table("kept as it is", "parameters", "why", box=None, pad_edge=False)
    for item in parts.kept:
        kept.add_row(item.name, f"{item.params:,}", item.reason)
    show(kept)


@verb("recipes", after_stop="nothing was written")
def _recipes() -> None:
    """List the built-in recipes."""
    from spectrim.recipe import Recipe, builtin_names

    rows = Table("recipe", "what it does", "paper", box=None, pad_edge=False)
    for name in builtin_names():
        recipe = Recipe.read(name)
        rows.add_row(recipe.name, recipe.summary, recipe.paper)
    show(rows)


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
    with progress() as report:
        inspection = inspect(
            load(source, **loaded_as),
            statistics,
            retain=retain,
            progress=lambda done, total: report("inspect", done, total),
        )
    for path in write(inspection, out, plots=plots):
        show(str(path))
