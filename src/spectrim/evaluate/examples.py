"""A few of the questions that were asked, with their images and what each model answered, for people to look at."""

import base64
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from spectrim.demo.tasks import Question
from spectrim.evaluate.answering import Answer

MOST = 24  # examples that are kept
_SIDE = 256  # pixels of an image's longer side at most


@dataclass(frozen=True)
class Example:
    """A question about an image with what each model `given` answered, in the order of the results.

    `correct` says the same of which answers count as right. `image` is a JPEG file in base64, 256 pixels at most.
    """

    task: str
    question: str
    expected: str
    given: tuple[str, ...]
    correct: tuple[bool, ...]
    image: str


def chosen(
    questions: Sequence[Question], answers: Sequence[Sequence[Answer]], reference: int | None
) -> tuple[Example, ...]:
    """At most 24 examples, those that most models answer wrong first, and as many of each task as there is room for.

    Args:
        questions: what was asked.
        answers: of each model, in the order of the questions.
        reference: number of the model with which the others are compared. Its right answers come first, since there it
            shows what others lost; None where there is none.
    """
    if not questions:
        return ()

    def wrong(number: int) -> tuple[bool, int]:
        lost = sum(not given[number].correct for model, given in enumerate(answers) if model != reference)
        return reference is None or answers[reference][number].correct, lost

    ranked = sorted(range(len(questions)), key=wrong, reverse=True)
    turns: dict[str, int] = defaultdict(int)  # questions of a task that come before
    order: list[tuple[int, int]] = []
    for number in ranked:
        order.append((turns[questions[number].task], number))
        turns[questions[number].task] += 1
    kept = {number for _, number in sorted(order, key=lambda turn: turn[0])[:MOST]}
    return tuple(
        Example(
            questions[number].task,
            questions[number].question,
            questions[number].answer,
            tuple(given[number].given for given in answers),
            tuple(given[number].correct for given in answers),
            encoded(questions[number].image),
        )
        for number in ranked
        if number in kept
    )


def encoded(image: Image.Image) -> str:
    """A small copy of an image as a JPEG file in base64."""
    small, content = image.convert("RGB"), BytesIO()
    small.thumbnail((_SIDE, _SIDE))
    small.save(content, format="JPEG", quality=90)
    return base64.b64encode(content.getvalue()).decode()
