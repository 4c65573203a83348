"""A column of the page as HTML: an answer, the token in which it differs, and what the model costs."""

from collections.abc import Sequence
from html import escape

from spectrim.ui.answers import Answer, Speaker, comparable, parting

CSS = """
.answer {min-height: 5em; padding: .8em 1em; border: 1px solid #8884; border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 1.05rem;}
.answer .none {opacity: .6;}
.answer .wrong {color: #b3261e;}
.answer mark {background: #ffd54f; color: #000; border-radius: 3px; padding: 0 .15em;}
.costs {display: grid; grid-template-columns: auto 1fr; gap: .15em 1em; margin: .6em 0 0; font-size: .92rem;}
.costs dt {opacity: .7;} .costs dd {margin: 0; font-variant-numeric: tabular-nums;}
.name {margin: 0 0 .4em; font-weight: 600; overflow-wrap: anywhere;}
"""


def columns(speakers: Sequence[Speaker], answers: Sequence[Answer] | None) -> list[str]:
    """HTML of each model's column; before a question ``answers`` is None. Others are compared with the first model."""
    said = [Answer() for _ in speakers] if answers is None else answers
    places = [_place(speakers, said, number) for number in range(len(speakers))]
    return [
        f'<p class="name">{escape(speaker.name)}</p>{_answer(speaker, answer, place, asked=answers is not None)}'
        f"{_costs(speaker, speakers[0], answer, _words(number, places, comparable(speakers[0], speaker), answer))}"
        for number, (speaker, answer, place) in enumerate(zip(speakers, said, places, strict=True))
    ]


def _place(speakers: Sequence[Speaker], answers: Sequence[Answer], number: int) -> int | None:
    """The token to mark: where this answer leaves the first, or where the first is left."""
    others = [number] if number else range(1, len(speakers))
    found = [parting(answers[0], answers[other]) for other in others if comparable(speakers[0], speakers[other])]
    return min((place for place in found if place is not None), default=None)


def _answer(speaker: Speaker, answer: Answer, place: int | None, *, asked: bool) -> str:
    if answer.failed is not None:
        return f'<div class="answer"><span class="wrong">{escape(answer.failed)}</span></div>'
    if not answer.tokens:
        return f'<div class="answer"><span class="none">{"…" if asked else "no question yet"}</span></div>'
    whole = speaker.read(answer.tokens)
    if place is None:
        return f'<div class="answer">{escape(whole)}</div>'
    before = _common(whole, speaker.read(answer.tokens[:place]))
    upto = _common(whole, speaker.read(answer.tokens[: place + 1]))
    marked = whole[len(before) : len(upto)] or "⏎"  # an end, or a token that is not shown
    return f'<div class="answer">{escape(before)}<mark>{escape(marked)}</mark>{escape(whole[len(upto) :])}</div>'


def _common(whole: str, part: str) -> str:
    """The beginning of ``whole`` that ``part`` agrees with; half a character at its end is left out."""
    length = next((i for i, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), min(len(whole), len(part)))
    return whole[:length]


def _words(number: int, places: Sequence[int | None], same: bool, answer: Answer) -> str | None:
    """What is said of the first difference; None in the first column, and before anything is known."""
    if not number or answer.failed is not None or not answer.tokens:
        return None
    if not same:
        return "has other tokens; not compared"
    place = places[number]
    if place is not None:
        return f"at token {place + 1}"
    return "none: the same answer" if answer.done else "none so far"


def _costs(speaker: Speaker, first: Speaker, answer: Answer, differs: str | None) -> str:
    speed = "–" if answer.per_second is None else f"{answer.per_second:.1f} tokens/s"
    first_token = "–" if answer.first_seconds is None else f"after {answer.first_seconds:.2f} s"
    rows = [
        ("speed", speed),
        ("first token", first_token),
        ("weights in memory", size(speaker.weights, first.weights if speaker is not first else None)),
        ("on disk", size(speaker.stored, first.stored if speaker is not first else None)),
        *([("first difference", differs)] if differs else []),
    ]
    return f'<dl class="costs">{"".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows)}</dl>'


def size(value: int | None, of: int | None = None) -> str:
    """Bytes for people, in powers of 1000, and as a share of those of the first model."""
    if value is None:
        return "not known"
    unit, power = next((u, p) for u, p in (("GB", 9), ("MB", 6), ("kB", 3), ("bytes", 0)) if value >= 10**p or p == 0)
    text = f"{value / 10**power:.{2 if power == 9 else 1 if power else 0}f} {unit}"
    return f"{text} ({value / of:.0%})" if of else text
