"""Questions about images with what each model answered, those that models answer wrong first."""

import re
from collections.abc import Sequence
from html import escape

from spectrim.bench.frontier import last_part
from spectrim.evaluate import EvaluationReport
from spectrim.evaluate.examples import Example

_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def cards(report: EvaluationReport) -> str:
    """A card for each example: models that give one answer share a line, the dense model's comes first. "" of none."""
    if not report.examples:
        return ""
    names = [last_part(result.directory) for result in report.results]
    dense = next((n for n, result in enumerate(report.results) if result.directory == report.reference), None)
    text = (
        "Some of the questions that were asked, first those that the dense model answers and most compressed models do "
        "not. ✓ and ✗ say which answers count as right."
    )
    apart = [example for example in report.examples if not all(example.correct)]
    alike = [example for example in report.examples if all(example.correct)]
    shown = _grid(apart, names, dense)
    if alike:
        title = f"{len(alike)} questions that all models answer right"
        shown += f"<details><summary>{title}</summary>{_grid(alike, names, dense)}</details>"
    return f"<p>{text}</p>{shown}"


def _grid(examples: Sequence[Example], names: list[str], dense: int | None) -> str:
    cards = "".join(_card(example, names, dense) for example in examples)
    return f'<div class="cards">{cards}</div>' if cards else ""


def _card(example: Example, names: list[str], dense: int | None) -> str:
    order = sorted(range(len(example.given)), key=lambda number: number != dense)
    groups: dict[tuple[str, bool], list[str]] = {}
    for number in order:
        groups.setdefault((example.given[number], example.correct[number]), []).append(names[number])
    answers = "".join(
        f"<dt class={'right' if correct else 'wrong'}>{escape(given) or '(nothing)'}</dt>"
        f"<dd>{_together(models, len(names))}</dd>"
        for (given, correct), models in groups.items()
    )
    image = ""
    if _BASE64.fullmatch(example.image):
        image = f'<img alt="image of this question" src="data:image/jpeg;base64,{example.image}">'
    return (
        f'<article class="card">{image}<p class="question">{escape(example.question)}</p>'
        f'<p class="small">{escape(example.task)}; right: {escape(example.expected)}</p><dl>{answers}</dl></article>'
    )


def _together(models: list[str], most: int) -> str:
    """Names, none of them broken at the end of a line."""
    if len(models) == most > 1:
        return f"all {most} models"
    return ", ".join(f"<span>{escape(model)}</span>" for model in models)
