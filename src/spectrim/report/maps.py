"""Charts of where bits and ranks went, and of how text and images differ."""

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt
import numpy as np

from spectrim.anatomy import ROLES
from spectrim.mismatch.analysis import Inspection
from spectrim.report.charts import COLOURS, SHAPES, Chart, styled
from spectrim.report.layout import Layout

# Colour and dashes of a line, by samples.
_LOOKS = {"text": (COLOURS[0], [7, 3]), "image": (COLOURS[1], [1, 0]), "joint": (COLOURS[2], [2, 2])}
_LABELLED = 14  # blocks up to which cells have room for their ranks
_ROLES = (*dict.fromkeys(ROLES.values()),)  # in the order of a block
_GRID = np.linspace(0, 1, 33)


def heat_maps(layout: Layout) -> Iterator[Chart]:
    """One chart for each part of a model: bits per weight by block and role, with the ranks."""
    top = max(cell.bits * cell.dense_bytes / max(1, cell.bytes) for cell in layout.cells)  # bits of dense weights
    parts = list(dict.fromkeys(cell.part for cell in layout.cells))
    for part in parts:
        cells = [cell for cell in layout.cells if cell.part == part]
        present = dict.fromkeys(cell.role for cell in cells)
        roles = sorted(present, key=lambda role: _ROLES.index(role) if role in _ROLES else len(_ROLES))
        blocks = sorted({cell.block for cell in cells if cell.block is not None})
        rows = [
            {
                "block": "–" if cell.block is None else str(cell.block),
                "role": cell.role,
                "bits": cell.bits,
                "label": f"{cell.bits:.1f}b" if cell.rank is None else f"r{cell.rank}",
                "rank": "–" if cell.rank is None else str(cell.rank),
                "forms": cell.forms,
                "bytes": cell.bytes,
                "kept": cell.bytes / max(1, cell.dense_bytes),
                "loss": cell.loss,
                "linears": cell.linears,
            }
            for cell in cells
        ]
        order = [*(["–"] if any(cell.block is None for cell in cells) else []), *map(str, blocks)]
        step = -(-len(order) // 16)
        base = alt.Chart(alt.Data(values=rows)).encode(
            x=alt.X(
                "block:N",
                title="Block" if blocks else None,
                sort=order,
                axis=alt.Axis(labelAngle=0, values=order[::step], grid=False, labels=bool(blocks), ticks=False),
            ),
            y=alt.Y("role:N", title=None, sort=roles, axis=alt.Axis(grid=False, ticks=False)),
            tooltip=[
                "block:N",
                "role:N",
                alt.Tooltip("linears:Q"),
                alt.Tooltip("forms:N", title="stored as"),
                "rank:N",
                alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
                alt.Tooltip("bytes:Q", format=","),
                alt.Tooltip("kept:Q", title="of dense bytes", format=".1%"),
                alt.Tooltip("loss:Q", title="predicted loss, nats", format=".3g"),
            ],
        )
        colour = alt.Color(
            "bits:Q",
            title="bits per weight",
            scale=alt.Scale(scheme="cividis", domain=[0, top], reverse=True),
            legend=alt.Legend(orient="bottom", gradientLength=180) if part == parts[-1] else None,
        )
        layers = [base.mark_rect(stroke="white").encode(color=colour)]
        if len(order) <= _LABELLED:
            contrast = alt.condition(alt.datum.bits > 0.5 * top, alt.value("white"), alt.value("black"))
            layers.append(base.mark_text(fontSize=11).encode(text="label:N", color=contrast))
        size, dense = sum(cell.bytes for cell in cells), sum(cell.dense_bytes for cell in cells)
        note = f"{size / 1e6:,.2f} of {dense / 1e6:,.2f} MB ({size / max(1, dense):.0%})"
        yield Chart(part.capitalize(), note, styled(alt.layer(*layers), 26 * len(roles)))


def experts(layout: Layout) -> Iterator[Chart]:
    """Bits per weight of each expert by the tokens that it saw; nothing of a checkpoint without experts."""
    if not layout.experts:
        return
    rows = [
        {
            "block": one.block,
            "expert": one.number,
            "tokens": one.tokens,
            "bits": one.bits,
            "rank": "–" if one.rank is None else str(one.rank),
            "forms": one.forms,
            "bytes": one.bytes,
        }
        for one in layout.experts
    ]
    tokens, none = sorted(one.tokens for one in layout.experts), sum(not one.tokens for one in layout.experts)
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_point(filled=True, size=45, opacity=0.75)
        .encode(
            x=alt.X(
                "tokens:Q",
                title="Tokens seen in calibration (log scale)",
                scale=alt.Scale(type="symlog" if none else "log", zero=False),
                axis=alt.Axis(format="~s", tickCount=6),
            ),
            y=alt.Y("bits:Q", title="Bits per weight", scale=alt.Scale(zero=True)),
            color=alt.Color(
                "block:Q", title="block", scale=alt.Scale(scheme="viridis"), legend=alt.Legend(gradientLength=180)
            ),
            tooltip=[
                "block:Q",
                "expert:Q",
                alt.Tooltip("tokens:Q", format=","),
                alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
                "rank:N",
                alt.Tooltip("forms:N", title="stored as"),
                alt.Tooltip("bytes:Q", format=","),
            ],
        )
    )
    note = (
        f"Each point is one of {len(rows)} experts with all its linears. Half of them saw {tokens[len(tokens) // 2]:,} "
        f"tokens or more, and {none} none: these have the mean of their layer's moments."
    )
    yield Chart("Experts by tokens", note, styled(chart))


def mismatches(inspection: Inspection) -> Iterator[Chart]:
    """Effective ranks by block, loss of images against text by block, and loss by rank for each kind of linear."""
    for place in dict.fromkeys(row.place for row in inspection.effective_ranks if row.layer is not None):
        if (chart := _effective_rank(inspection, place)) is not None:
            yield chart
    if any(row.rho is not None and row.layer is not None for row in inspection.linears):
        yield _rho(inspection)
    for module in dict.fromkeys((row.place, row.role) for row in inspection.linears):
        yield _errors(inspection, *module)


def _effective_rank(inspection: Inspection, place: str) -> Chart | None:
    rows = [
        {"layer": row.layer, "samples": samples, "share": rank / row.full}
        for row in inspection.effective_ranks
        for samples, rank in (("text", row.text), ("image", row.image), ("joint", row.joint))
        if row.place == place and row.layer is not None and rank is not None
    ]
    if not rows:
        return None
    chart = _by_samples(rows).encode(
        x=_layers(sorted({int(str(row["layer"])) for row in rows})),
        y=alt.Y(
            "mean(share):Q", title="Effective rank / full rank", axis=alt.Axis(format="%"), scale=alt.Scale(zero=True)
        ),
    )
    note = (
        f"Share of the directions that hold {inspection.energy:.0%} of the output's energy, mean over the linears of a "
        "block."
    )
    return Chart(f"Effective rank, {place}", note, styled(chart))


def _rho(inspection: Inspection) -> Chart:
    rows: list[dict[str, Any]] = [
        {"layer": row.layer, "role": row.role, "rho": max(row.rho, 1e-2)}
        for row in inspection.linears
        if row.rho is not None and row.layer is not None
    ]
    roles = list(dict.fromkeys(row["role"] for row in rows))
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(roles))]
    shapes = [SHAPES[number % len(SHAPES)] for number in range(len(roles))]
    base = alt.Chart(alt.Data(values=rows))
    title: dict[str, Any] = {"title": None, "sort": roles}
    lines = base.mark_line(point=alt.OverlayMarkDef(size=60, filled=True)).encode(
        x=_layers(sorted({row["layer"] for row in rows})),
        y=alt.Y(
            "mean(rho):Q",
            title="ρ (log scale)",
            scale=alt.Scale(type="log", nice=False),
            axis=alt.Axis(format="~g", tickCount=5),
        ),
        color=alt.Color("role:N", scale=alt.Scale(domain=roles, range=colours), **title),
        shape=alt.Shape("role:N", scale=alt.Scale(domain=roles, range=shapes), **title),
        tooltip=["role:N", "layer:O", alt.Tooltip("mean(rho):Q", title="ρ", format=".3g")],
    )
    even = alt.Chart(alt.Data(values=[{"rho": 1.0}])).mark_rule(strokeDash=[5, 4], color="#555").encode(y="rho:Q")
    note = (
        f"Loss of images over loss of text at {inspection.retain:.0%} retention, where directions are chosen by text "
        "alone. Above the dashed line images lose more."
    )
    return Chart("What text-only directions cost images", note, styled(alt.layer(even, lines)))


def _errors(inspection: Inspection, place: str, role: str) -> Chart:
    linears = [row for row in inspection.linears if (row.place, row.role) == (place, role)]
    rows = []
    for samples in ("text", "image"):
        curves = [np.interp(_GRID, np.array(x.ranks) / x.ranks[-1], getattr(x, samples)) for x in linears]
        rows += [
            {"share": float(share), "loss": float(loss), "samples": samples}
            for share, loss in zip(_GRID, np.mean(curves, axis=0), strict=True)
            if loss > 1e-3
        ]
    lines = _by_samples(rows, points=False).encode(
        x=alt.X("share:Q", title="Rank kept / full rank", axis=alt.Axis(format="%", tickCount=5)),
        y=alt.Y(
            "loss:Q",
            title="Relative loss (log scale)",
            scale=alt.Scale(type="log", nice=False),
            axis=alt.Axis(format="~%", tickCount=4),
        ),
    )
    cut = float(np.mean([x.rank / x.ranks[-1] for x in linears]))
    rule = alt.Chart(alt.Data(values=[{"cut": cut}])).mark_rule(color="#555", strokeDash=[2, 3]).encode(x="cut:Q")
    note = (
        f"Mean over {len(linears)} linears; the gap is loss of images that text does not show. "
        f"Dotted: {inspection.retain:.0%} retention."
    )
    return Chart(f"Loss by rank, {place} {role}", note, styled(alt.layer(rule, lines), 200))


def _by_samples(rows: Sequence[dict[str, Any]], *, points: bool = True) -> Any:
    mark: dict[str, Any] = {"point": alt.OverlayMarkDef(size=60, filled=True)} if points else {}
    kinds = [kind for kind in _LOOKS if any(row["samples"] == kind for row in rows)]
    colours = alt.Scale(domain=kinds, range=[_LOOKS[kind][0] for kind in kinds])
    dash = alt.Scale(domain=kinds, range=[_LOOKS[kind][1] for kind in kinds])
    return (
        alt.Chart(alt.Data(values=list(rows)))
        .mark_line(strokeWidth=2.5, **mark)
        .encode(
            color=alt.Color("samples:N", title=None, scale=colours),
            strokeDash=alt.StrokeDash("samples:N", title=None, scale=dash),
            **({"shape": alt.Shape("samples:N", title=None, scale=alt.Scale(domain=kinds))} if points else {}),
        )
    )


def _layers(layers: Sequence[int]) -> Any:
    return alt.X("layer:O", title="Block", axis=alt.Axis(labelAngle=0, values=list(layers)[:: -(-len(layers) // 16)]))
