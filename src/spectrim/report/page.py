"""The page: sections of text, tables and charts in one HTML file that needs no network."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from typing import Any

import vl_convert

from spectrim.bench import Frontier
from spectrim.bench.frontier import Point, cells, last_part
from spectrim.bench.measure import Row
from spectrim.evaluate.tables import remarks
from spectrim.report.cards import cards
from spectrim.report.charts import Chart, Series, pareto, prediction, series_of
from spectrim.report.layout import Layout
from spectrim.report.maps import experts, heat_maps, mismatches
from spectrim.report.reading import Material

MARK = '<meta name="generator" content="spectrim report">'
_POLICY = (  # nothing is fetched from anywhere; Vega makes functions of the expressions in its specifications
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
_SYMBOLS = {
    "circle": '<circle cx="8" cy="8" r="5"/>',
    "square": '<path d="M3.5 3.5h9v9h-9z"/>',
    "diamond": '<path d="M8 2l5 6-5 6-5-6z"/>',
    "triangle-up": '<path d="M8 3l5.5 10h-11z"/>',
    "triangle-down": '<path d="M8 13L2.5 3h11z"/>',
    "triangle-right": '<path d="M13 8L3 13.5v-11z"/>',
    "triangle-left": '<path d="M3 8l10 5.5v-11z"/>',
    "cross": '<path d="M6 2h4v4h4v4h-4v4H6v-4H2V6h4z"/>',
}
_HEADINGS = (
    "model", "size, MB", "% of dense", "accuracy, %", "% kept", "perplexity", "KL text", "KL images", "decode, ×",
    "memory, MB",
)  # fmt: skip
_LOW, _REFERENCE = ' class="low"', ' class="reference"'
_LITTLE = 0.95  # of the dense model's quality; what keeps less is marked


class Page:
    """Sections that are added one after the other, and the charts that they show."""

    def __init__(self) -> None:
        self._sections: list[tuple[str, str]] = []
        self._specs: list[object] = []

    def section(self, title: str, *content: str) -> None:
        """A section under a heading; none without content."""
        if any(content):
            self._sections.append((title, "\n".join(content)))

    def charts(self, charts: Iterable[Chart], kind: str = "grid", level: str = "h3") -> str:
        """Figures of charts, in as many columns as there is room for (`grid`) or one (`wide`); "" of none."""
        figures = []
        for chart in charts:
            title, number = escape(chart.title), len(self._specs)
            place = f'<div class="chart" role="img" aria-label="{title}" data-chart="{number}"></div>'
            note = f"<figcaption>{escape(chart.note)}</figcaption>"
            figures.append(f"<figure><{level}>{title}</{level}>{place}{note}</figure>")
            self._specs.append(chart.spec)
        return f"<div class={kind}>{''.join(figures)}</div>" if figures else ""

    def html(self, title: str, about: Sequence[str]) -> str:
        """The whole file."""
        here = files("spectrim.report")
        links = " ".join(f'<a href="#s{n}">{escape(name)}</a>' for n, (name, _) in enumerate(self._sections))
        sections = [
            f'<section><h2 id="s{n}">{escape(name)}</h2>{content}</section>'
            for n, (name, content) in enumerate(self._sections)
        ]
        style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        # "<" cannot end the script: it is an escape inside of JSON.
        specs = json.dumps(self._specs, ensure_ascii=False, sort_keys=True, allow_nan=False).replace("<", "\\u003c")
        lines = [
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8">{MARK}',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{style}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *(f'<p class="small">{escape(line)}</p>' for line in about),
            f"<nav>{links}</nav>",
            *sections,
            f'<script type="application/json" id="charts">{specs}</script>',
            f"<script>{_vega()}</script>" if self._specs else "",
            f"<script>{script}</script>" if self._specs else "",
            "</body></html>",
        ]
        return "\n".join(lines) + "\n"


def _vega() -> str:
    """The scripts of Vega, as Altair has them."""
    bundle: Any = vl_convert.javascript_bundle
    return str(bundle())


def page(material: Material) -> str:
    """The page of all that was read."""
    made = Page()
    many = len(material.frontiers) > 1
    rows = [row for bench in material.benches for row in bench.rows]
    about: list[str] = []
    for number, frontier in enumerate(material.frontiers, start=1):
        about.append(_about(frontier))
        _quality(made, frontier, rows, f" ({number})" if many else "")
    made.section("Where the bytes went", _layouts(made, material.layouts))
    for inspection in material.inspections:
        text = "Directions chosen by text alone miss what images need: the more, the further apart the lines."
        notes = "".join(f'<p class="small">{escape(note)}</p>' for note in inspection.notes)
        made.section("What text-only whitening misses", f"<p>{text}</p>", notes, made.charts(mismatches(inspection)))
    benches = [*material.benches, *(f.bench for f in material.frontiers if f.bench is not None)]
    for bench in benches:
        named = replace(bench, rows=tuple(replace(row, model=last_part(row.model)) for row in bench.rows))
        how = f'<p class="small">{escape(bench.date)}, {escape(bench.about)}</p>'
        made.section("Speed and memory", _table(named.cells()), how)
    return made.html("spectrim report", about)


def _about(frontier: Frontier) -> str:
    report = frontier.evaluation
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items() if number)
    sources = [
        f"{kind}: {source.name.rpartition('/')[2]} ({source.sha256[:12]}…)"
        for kind, source in (("text", report.text), ("questions", report.questions))
        if source is not None
    ]
    return f"Measured {report.date[:10]} with {versions}; {'; '.join(sources)}."


def _quality(made: Page, frontier: Frontier, rows: Sequence[Row], suffix: str) -> None:
    report, points = frontier.evaluation, frontier.points(rows)
    dense = report.reference
    names = [series_of(point, dense) for point in points]
    series = Series(names)
    floor = None if report.blind is None else report.blind.mean
    lost = "".join(f"<li>{escape(line)}</li>" for line in (*frontier.lines(), *remarks(report)))
    made.section(
        f"Results{suffix}",
        _overview(points, dense),
        '<p class="small">KL: divergence from the dense model, nats per token. Orange: less than 95 % of the dense '
        "model's accuracy, or a perplexity more than 1/0.95 times as high.</p>",
        f'<ul class="small said">{lost}</ul>' if lost else "",
    )
    drawn = made.charts(pareto(points, dense, series, floor))
    made.section(f"Quality over cost{suffix}", _legend(series, names) if drawn else "", drawn)
    made.section(f"Questions about images{suffix}", cards(report))
    if (chart := prediction(points, dense, series)) is not None:
        made.section(f"Predicted and measured loss{suffix}", _legend(series, names), made.charts([chart]))


def _overview(points: Sequence[Point], dense: str | None) -> str:
    whole = next((point for point in points if point.result.directory == dense), None)
    full = None if whole is None else whole.perplexity
    lines = []
    for point in points:
        little = point.kept is not None and point.kept < _LITTLE
        worse = full is not None and point.perplexity is not None and full / point.perplexity < _LITTLE
        values = [point.name, *cells(point)]
        low = [(number in (3, 4) and little) or (number == 5 and worse) for number in range(len(values))]
        row = "".join(
            f"<td{_LOW if marked else ''}>{escape(value)}</td>" for value, marked in zip(values, low, strict=True)
        )
        lines.append(f"<tr{_REFERENCE if point is whole else ''}>{row}</tr>")
    return _framed(_HEADINGS, lines)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table from its headings and rows."""
    head, *body = rows
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    return _framed(head, [f"<tr>{line}</tr>" for line in lines])


def _framed(headings: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _legend(series: Series, names: Sequence[str]) -> str:
    items = "".join(
        f'<li><svg width="16" height="16" fill="{colour}" aria-hidden="true">{_SYMBOLS[shape]}</svg>{escape(name)}</li>'
        for name, (colour, shape) in series.marks.items()
        if name in names
    )
    return f'<ul class="legend">{items}</ul>'


def _layouts(made: Page, layouts: Sequence[Layout]) -> str:
    shown = []
    for number, layout in enumerate(layouts):
        charts = made.charts([*heat_maps(layout), *experts(layout)], "wide", "h4")
        size, dense = sum(cell.bytes for cell in layout.cells), sum(cell.dense_bytes for cell in layout.cells)
        title = f"{layout.name}: {size / 1e6:,.2f} of {dense / 1e6:,.2f} MB of matrices"
        shown.append(f"<details{' open' if number == 0 else ''}><summary>{escape(title)}</summary>{charts}</details>")
    if not shown:
        return ""
    text = (
        "Bits per weight of each block and role: the darker, the more was spent. r12 is a rank of 12 (the median where "
        "there are several linears); 4.1b are integers of 4.1 bits with their scales, or a dense matrix at 16."
    )
    return f"<p>{text}</p>{''.join(shown)}"
