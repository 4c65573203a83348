"""Charts of the mismatch analysis (needs the extra ``report``: Altair and vl-convert)."""

from io import BytesIO
from typing import Any

import altair as alt
import numpy as np

from spectrim.mismatch.analysis import Inspection

# Okabe and Ito's colours, which colour-blind readers tell apart; shapes say the same again.
_TEXT, _IMAGE, _JOINT = "#0072B2", "#D55E00", "#009E73"
_COLOURS = [_TEXT, _IMAGE, _JOINT, "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_GRID = np.linspace(0, 1, 65)
_FLOOR = 1e-3  # losses below it are off the page
_LEAST_RHO = 1e-2  # a smaller one is drawn here: the axis is logarithmic, and 0 is possible
_MODALITY = alt.Color("samples:N", title="Samples", scale=alt.Scale(domain=["text", "image"], range=[_TEXT, _IMAGE]))


def draw(inspection: Inspection) -> dict[str, bytes]:
    """Content by file name: each chart as a self-contained HTML page and as a PNG."""
    charts = {"effective_rank": _effective_rank(inspection)}
    if any(row.rho is not None and row.layer is not None for row in inspection.linears):
        charts["rho"] = _rho(inspection)
    if inspection.linears:
        charts["error_curves"] = _error_curves(inspection)
    if any(len(row.token) > 1 and row.layer is not None for row in inspection.etas):
        charts["eta_by_head"] = _eta_by_head(inspection)
    files: dict[str, bytes] = {}
    for name, chart in charts.items():
        page, image = chart.properties(padding=20), BytesIO()
        page.save(image, format="png", scale_factor=2)
        files |= {f"{name}.html": page.to_html(inline=True).encode(), f"{name}.png": image.getvalue()}
    return files


def _styled(chart: Any, title: str, *subtitle: str) -> Any:
    heading = alt.TitleParams(
        title, subtitle=list(subtitle), anchor="start", fontSize=18, subtitleFontSize=13, offset=16
    )
    return (
        chart.properties(title=heading)
        .configure_view(stroke=None)
        .configure_axis(labelFontSize=12, titleFontSize=13, titleFontWeight="normal", gridColor="#e6e6e6")
        .configure_legend(labelFontSize=12, titleFontSize=13, symbolOpacity=1)
        .configure_header(labelFontSize=14, labelFontWeight="bold", titleFontSize=0)
    )


def _layer_axis(layers: set[int]) -> Any:
    step = -(-len(layers) // 16)
    return alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0, values=sorted(layers)[::step]))


def _rho(inspection: Inspection) -> Any:
    rows: list[dict[str, Any]] = [
        {"layer": row.layer, "role": row.role, "place": row.place, "rho": max(row.rho, _LEAST_RHO)}
        for row in inspection.linears
        if row.layer is not None and row.rho is not None
    ]
    roles = list(dict.fromkeys(row["role"] for row in rows))
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(roles))]
    lines = (
        alt.Chart()
        .mark_line(point=alt.OverlayMarkDef(size=70, filled=True))
        .encode(
            x=_layer_axis({row["layer"] for row in rows}),
            y=alt.Y(
                "mean(rho):Q",
                title="ρ, image loss over text loss (log scale)",
                scale=alt.Scale(type="log"),
                axis=alt.Axis(grid=True),
            ),
            color=alt.Color("role:N", title="Linear", sort=roles, scale=alt.Scale(domain=roles, range=colours)),
            shape=alt.Shape("role:N", title="Linear", sort=roles, scale=alt.Scale(domain=roles)),
            tooltip=["role:N", "layer:O", alt.Tooltip("mean(rho):Q", title="ρ", format=".3g")],
        )
    )
    even = alt.Chart().mark_rule(strokeDash=[6, 4], color="#444", strokeWidth=1.5).encode(y=alt.datum(1.0))
    chart = _by_place(alt.layer(even, lines).properties(width=620, height=360), rows, independent=False)
    return _styled(
        chart,
        f"Loss of images against text at {inspection.retain:.0%} retention",
        "Directions chosen by text alone. ρ: share of their energy that images lose, over the share that text loses.",
        "On the dashed line (ρ = 1) text-only directions serve both alike.",
    )


def _error_curves(inspection: Inspection) -> Any:
    modules: dict[str, list[Any]] = {}
    for row in inspection.linears:
        modules.setdefault(f"{row.place} {row.role}", []).append(row)
    values, marks = [], []
    for module, linears in modules.items():
        for samples in ("text", "image"):
            curves = [np.interp(_GRID, np.array(x.ranks) / x.ranks[-1], getattr(x, samples)) for x in linears]
            values += [
                {"module": module, "samples": samples, "share": float(share), "loss": float(loss)}
                for share, loss in zip(_GRID, np.mean(curves, axis=0), strict=True)
                if loss > 0
            ]
        marks.append({"module": module, "share": float(np.mean([x.rank / x.ranks[-1] for x in linears]))})
    lines = (
        alt.Chart()
        .mark_line(strokeWidth=2.5, clip=True)
        .encode(
            x=alt.X(
                "share:Q", title="Rank kept / full rank", axis=alt.Axis(format="%", values=[0, 0.25, 0.5, 0.75, 1])
            ),
            y=alt.Y(
                "loss:Q",
                title="Relative loss (log scale)",
                scale=alt.Scale(type="log", domain=[_FLOOR, 1]),
                axis=alt.Axis(values=[1, 0.1, 0.01, 0.001], format="~%"),
            ),
            color=_MODALITY,
            strokeDash=alt.StrokeDash(
                "samples:N", title="Samples", scale=alt.Scale(domain=["text", "image"], range=[[7, 3], [1, 0]])
            ),
            tooltip=[
                "module:N",
                "samples:N",
                alt.Tooltip("share:Q", format=".1%"),
                alt.Tooltip("loss:Q", format=".3g"),
            ],
        )
    )
    rule = alt.Chart().mark_rule(color="#444", strokeDash=[2, 3]).encode(x="mean(cut):Q")
    share = {mark["module"]: mark["share"] for mark in marks}
    data = alt.Data(values=[{**value, "cut": share[str(value["module"])]} for value in values])
    chart = alt.layer(rule, lines, data=data).properties(width=200, height=190)
    facets = chart.facet(alt.Facet("module:N", title=None, sort=list(modules)), columns=min(4, len(modules)))
    return _styled(
        facets,
        "Reconstruction loss by rank, directions chosen by text alone",
        "Share of the output's energy that is lost, mean over layers. A gap between the lines is loss of images that",
        f"text does not show. Dotted: the rank of {inspection.retain:.0%} retention.",
    )


def _eta_by_head(inspection: Inspection) -> Any:
    """η of heads, LASER's figure 3."""
    rows: list[dict[str, Any]] = [
        {"layer": row.layer, "module": f"{row.place} {row.role}", "samples": row.modality, "head": head, "eta": eta}
        for row in inspection.etas
        for head, eta in enumerate(row.token)
        if row.layer is not None and len(row.token) > 1 and eta > 0
    ]
    modules = list(dict.fromkeys(row["module"] for row in rows))
    dots = (
        alt.Chart(alt.Data(values=rows))
        .mark_point(size=40)
        .encode(
            x=_layer_axis({row["layer"] for row in rows}),
            y=alt.Y("eta:Q", title="η by token (log scale)", scale=alt.Scale(type="log")),
            color=_MODALITY,
            shape=alt.Shape("samples:N", title="Samples", scale=alt.Scale(domain=["text", "image"])),
            tooltip=["module:N", "layer:O", "head:O", "samples:N", alt.Tooltip("eta:Q", format=".3g")],
        )
        .properties(width=260, height=220)
    )
    facets = dots.facet(alt.Facet("module:N", title=None, sort=modules), columns=min(3, len(modules)))
    return _styled(
        facets,
        "Trace-ratio correction η of each head",
        "tr F / (tr G · tr C): 1 where the gradients of a head's outputs do not depend on its inputs.",
    )


def _effective_rank(inspection: Inspection) -> Any:
    rows: list[dict[str, Any]] = [
        {
            "place": row.place,
            "layer": row.layer,
            "samples": samples,
            "share": rank / row.full,
            "name": row.name,
            "rank": rank,
        }
        for row in inspection.effective_ranks
        for samples, rank in (("text", row.text), ("image", row.image), ("joint", row.joint))
        if row.layer is not None and rank is not None
    ]
    kinds = list(dict.fromkeys(row["samples"] for row in rows))
    colours = alt.Scale(domain=kinds, range=[{"text": _TEXT, "image": _IMAGE}.get(kind, _JOINT) for kind in kinds])
    base = alt.Chart().encode(
        x=_layer_axis({row["layer"] for row in rows}),
        color=alt.Color("samples:N", title="Samples", scale=colours),
        shape=alt.Shape("samples:N", title="Samples", scale=alt.Scale(domain=kinds)),
    )
    dots = base.mark_point(opacity=0.35, size=35).encode(
        y=alt.Y("share:Q", title="Effective rank / full rank", axis=alt.Axis(format="%")),
        tooltip=["name:N", "samples:N", "rank:Q", alt.Tooltip("share:Q", format=".1%")],
    )
    means = base.mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=70, filled=True)).encode(y="mean(share):Q")
    chart = _by_place(alt.layer(dots, means).properties(width=420, height=320), rows, independent=True)
    return _styled(
        chart,
        f"Effective rank for {inspection.energy:.0%} of the energy",
        "Share of the directions that hold the output's energy. Pale: single linears. Lines: mean of each layer.",
    )


def _by_place(chart: Any, rows: list[dict[str, Any]], *, independent: bool) -> Any:
    """One panel for each place, side by side; `independent`: each has its own layers."""
    places = list(dict.fromkeys(row["place"] for row in rows))
    chart.data = alt.Data(values=rows)
    facets = chart.facet(column=alt.Column("place:N", title=None, sort=places))
    return facets.resolve_scale(x="independent") if independent else facets
