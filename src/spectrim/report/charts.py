"""The charts of the page, of single views that are as wide as their place; colours by Okabe and Ito, shapes besides."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite, log
from typing import Any

import altair as alt

from spectrim.bench.frontier import Point

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b")
SHAPES = ("circle", "square", "triangle-up", "triangle-down", "triangle-right", "cross", "triangle-left")
DENSE, DENSE_COLOUR, DENSE_SHAPE = "dense", "#000000", "diamond"
_LEAST = 1e-5  # nats; what is less, or below zero by chance, is drawn here, since the axis is logarithmic


@dataclass(frozen=True)
class Chart:
    """One chart: a title, a sentence below it, and its specification in Vega-Lite."""

    title: str
    note: str
    spec: dict[str, Any]


def styled(chart: Any, height: int | None = 260) -> dict[str, Any]:
    """The specification of a chart that is as wide as its place."""
    sized = chart.properties(width="container", **({} if height is None else {"height": height}))
    spec: dict[str, Any] = (
        sized.configure(
            font="system-ui, sans-serif", background="white", autosize={"type": "fit-x", "contains": "padding"}
        )
        .configure_view(stroke=None)
        .configure_axis(
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            gridColor="#e6e6e6",
            labelColor="#333",
            titleColor="#333",
            labelOverlap=True,
        )
        .configure_legend(orient="bottom", columns=2, labelFontSize=12, titleFontSize=12, labelLimit=240)
        .to_dict()
    )
    return spec


class Series:
    """Colours and shapes of recipes, the same in all charts; the dense model is a black diamond."""

    def __init__(self, names: Sequence[str]) -> None:
        own = [name for name in dict.fromkeys(names) if name != DENSE]
        self.marks: dict[str, tuple[str, str]] = {DENSE: (DENSE_COLOUR, DENSE_SHAPE)}
        for number, name in enumerate(own):
            self.marks[name] = COLOURS[number % len(COLOURS)], SHAPES[(number + number // len(COLOURS)) % len(SHAPES)]

    def colour(self) -> Any:
        """The channel."""
        domain = list(self.marks)
        colours = [colour for colour, _ in self.marks.values()]
        return alt.Color("series:N", legend=None, scale=alt.Scale(domain=domain, range=colours))

    def shape(self) -> Any:
        """The channel."""
        domain = list(self.marks)
        shapes = [shape for _, shape in self.marks.values()]
        return alt.Shape("series:N", legend=None, scale=alt.Scale(domain=domain, range=shapes))


def series_of(point: Point, dense: str | None) -> str:
    """The name of a model's line: its recipe, or its own name where that is not known."""
    return DENSE if point.result.directory == dense else point.recipe or point.name


_QUALITIES: tuple[tuple[str, str, str, bool, Callable[[Point], float | None]], ...] = (
    ("VQA accuracy", "higher is better", "%", False, lambda point: point.accuracy),
    ("Perplexity", "lower is better, log scale", "~f", True, lambda point: point.perplexity),
    ("KL divergence, text", "nats per token, lower is better, log scale", "~g", True,
     lambda point: point.divergence.get("text")),
    ("KL divergence, images", "nats per token, lower is better, log scale", "~g", True,
     lambda point: point.divergence.get("image")),
)  # fmt: skip


def pareto(points: Sequence[Point], dense: str | None, series: Series, floor: float | None) -> Iterator[Chart]:
    """Each measure of quality over file size, decode latency and memory, where both are known."""
    unit, factor = ("GB", 1e9) if max(point.bytes for point in points) >= 2e9 else ("MB", 1e6)
    costs: tuple[tuple[str, str, Callable[[Point], float | None]], ...] = (
        ("file size", unit, lambda point: point.bytes / factor),
        ("decode latency", "ms per token", lambda point: None if point.decode is None else 1e3 * point.decode),
        ("memory of the weights", unit, lambda point: point.memory_bytes and point.memory_bytes / factor),
    )
    for quality, note, form, logarithmic, y in _QUALITIES:
        for cost, measure, x in costs:
            rows = []
            for point in points:
                across, up = x(point), y(point)
                if across is not None and up is not None and isfinite(up) and (up > 0 or not logarithmic):
                    name = series_of(point, dense)
                    row = {"x": across, "y": up, "series": name, "model": point.name}
                    rows.append({**row, "bytes": point.bytes, "limit": point.limit})
            if len(rows) < 2:
                continue
            title = f"{quality} by {cost}"
            line = floor if quality == "VQA accuracy" else None
            yield Chart(title, f"{note}; further left is cheaper", styled(
                _quality(rows, series, f"{cost.capitalize()}, {measure}", quality, form, logarithmic, line)
            ))  # fmt: skip


def _quality(
    rows: list[dict[str, Any]], series: Series, x: str, y: str, form: str, logarithmic: bool, floor: float | None
) -> Any:
    across = alt.Scale(zero=False, nice=True, padding=12)
    scale = alt.Scale(type="log", nice=False, padding=12) if logarithmic else across
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("x:Q", title=x, scale=across, axis=alt.Axis(tickCount=6)),
        y=alt.Y("y:Q", title=y, scale=scale, axis=alt.Axis(format=form, tickCount=6)),
        color=series.colour(),
    )
    lines = base.transform_filter(alt.datum.series != DENSE).mark_line(strokeWidth=1.5, opacity=0.7)
    layers = [
        lines.encode(detail="limit:N", order="bytes:Q"),
        base.mark_point(size=90, filled=True, opacity=0.95, stroke="white", strokeWidth=0.8).encode(
            shape=series.shape(),
            tooltip=[
                alt.Tooltip("model:N"),
                alt.Tooltip("series:N", title="recipe"),
                alt.Tooltip("x:Q", title=x, format=".4~g"),
                alt.Tooltip("y:Q", title=y, format=".4~g" if logarithmic else ".1%"),
            ],
        ),
    ]
    if (whole := next((row["y"] for row in rows if row["series"] == DENSE), None)) is not None:
        layers.insert(0, _level(whole))
    if floor is not None:
        layers += [_level(floor), _label(floor, "without looking at the image")]
    return alt.layer(*layers)


def _level(value: float) -> Any:
    rule = alt.Chart(alt.Data(values=[{"y": value}])).mark_rule(strokeDash=[5, 4], color="#555")
    return rule.encode(y="y:Q")


def _label(value: float, text: str) -> Any:
    mark = alt.Chart(alt.Data(values=[{"y": value, "text": text}]))
    where: dict[str, Any] = {"align": "right", "baseline": "bottom", "dy": -3, "color": "#555", "fontSize": 11}
    return mark.mark_text(**where).encode(x=alt.value("width"), y="y:Q", text="text:N")


def prediction(points: Sequence[Point], dense: str | None, series: Series) -> Chart | None:
    """Predicted rise of the loss over what was measured, by modality; None where no model has both."""
    whole = next((point.perplexity for point in points if point.result.directory == dense), None)
    rows: list[dict[str, Any]] = []
    for point in points:
        predicted = point.result.predicted_loss or {}
        measured = dict(point.divergence)
        if "text" not in measured and whole and point.perplexity and series_of(point, dense) != DENSE:
            measured["text"] = log(point.perplexity) - log(whole)
        if measured.keys() >= {"text", "image"}:
            measured["joint"] = measured["text"] + point.result.image_price * measured["image"]
        name = series_of(point, dense)
        for modality, words in (("text", "text"), ("image", "images"), ("joint", "both, before compensation")):
            if modality in predicted and isfinite(measured.get(modality, inf)):
                pair = {"predicted": predicted[modality], "measured": measured[modality]}
                held = {key: max(_LEAST, value) for key, value in pair.items()}
                said = {f"{key}_said": value for key, value in pair.items()}
                rows.append({**held, **said, "series": name, "model": point.name, "of": words})
    if not rows:
        return None
    ends = [min(min(row["predicted"], row["measured"]) for row in rows) / 1.5]
    ends.append(max(max(row["predicted"], row["measured"]) for row in rows) * 1.5)
    kinds = list(dict.fromkeys(row["of"] for row in rows))
    scale = alt.Scale(type="log", domain=ends, nice=False)
    diagonal = alt.Chart(alt.Data(values=[{"x": end, "y": end} for end in ends])).mark_line(
        color="#555", strokeDash=[5, 4], strokeWidth=1
    )
    marks = alt.Chart(alt.Data(values=rows)).mark_point(size=90, filled=True, opacity=0.9)
    axis = alt.Axis(format="~g", tickCount=5)
    chart = alt.layer(
        diagonal.encode(x=alt.X("x:Q", scale=scale), y=alt.Y("y:Q", scale=scale)),
        marks.encode(
            x=alt.X("predicted:Q", title="Predicted, nats per token", scale=scale, axis=axis),
            y=alt.Y("measured:Q", title="Measured, nats per token", scale=scale, axis=axis),
            color=series.colour(),
            shape=alt.Shape(
                "of:N", title=None, sort=kinds, scale=alt.Scale(domain=kinds, range=[*SHAPES[: len(kinds)]])
            ),
            tooltip=[
                "model:N",
                alt.Tooltip("of:N", title="of"),
                alt.Tooltip("predicted_said:Q", title="predicted", format=".3g"),
                alt.Tooltip("measured_said:Q", title="measured", format=".3g"),
            ],
        ),
    )
    note = (
        "On the dashed line both are equal; above it the loss rose more than predicted. Measured is the KL divergence "
        "from the dense model, or the rise of the text loss where that was not measured."
    )
    return Chart("Predicted and measured rise of the loss", note, styled(chart, 320))
