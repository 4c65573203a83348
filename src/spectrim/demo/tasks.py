"""The built-in visual question suite: nine generated tasks, each a seeded stream of (image, question, short answer)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from PIL import Image

from spectrim.demo.scene import COLOURS, GRID, SHAPES, Item, draw_icon, draw_scene, draw_word, icon_names
from spectrim.errors import SampleError

SPLITS = ("train", "calibration", "test")

WORDS = (
    "arm army art baby back bag ball bank bear bed bell bird boat body bone book boot bowl box bus cake camp card cat "
    "city clay coal coin corn cow crab cup desk dish dog door drum dust ear east egg face farm fire fish flag fox "
    "game gate girl gold hand hat hill horn ice ink iron jump key king kite lamp leaf lion map milk moon neck net oil "
    "oven page pen pig pin pipe plum pot rain ring road rock rope salt sea seat ship shoe shop silk sink sky snow "
    "soap sock song soup star sun tail tea tent toe toy tree vase wall wave wind wine wing wolf wood wool worm yard "
    "year"
).split()


@dataclass(frozen=True)
class Question:
    """An RGB image (a built-in one is 112x112), a question about it and the short answer that counts as right."""

    task: str
    image: Image.Image
    question: str
    answer: str


def _sample(rng: np.random.Generator, pool: list[str], count: int) -> list[str]:
    return [pool[i] for i in rng.choice(len(pool), count, replace=False)]


def _cells(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    return [divmod(int(i), GRID) for i in rng.choice(GRID**2, count, replace=False)]


def _items(rng: np.random.Generator, count: int) -> list[Item]:
    """Items whose shapes all differ and whose colours all differ, so that either one names an item."""
    shapes, colours = _sample(rng, list(SHAPES), count), _sample(rng, list(COLOURS), count)
    return [
        Item(shape, colour, row, column, float(rng.uniform(9, 13)))
        for shape, colour, (row, column) in zip(shapes, colours, _cells(rng, count), strict=True)
    ]


def _colour(rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    items = _items(rng, int(rng.integers(2, 5)))
    return draw_scene(items, rng), f"What colour is the {items[0].shape}?", items[0].colour


def _shape(rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    items = _items(rng, int(rng.integers(2, 5)))
    return draw_scene(items, rng), f"Which shape is {items[0].colour}?", items[0].shape


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return {"cross": "crosses"}.get(shape, shape + "s")


def _count(rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    wanted, other = _sample(rng, list(SHAPES), 2)
    count, distractors = int(rng.integers(1, 6)), int(rng.integers(0, 3))
    colours = list(COLOURS)
    items = [
        Item(
            wanted if i < count else other, colours[rng.integers(len(colours))], row, column, float(rng.uniform(9, 13))
        )
        for i, (row, column) in enumerate(_cells(rng, count + distractors))
    ]
    return draw_scene(items, rng), f"How many {plural(wanted)} are there?", str(count)


def _position(rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    items = _items(rng, int(rng.integers(2, 5)))
    return draw_scene(items, rng), f"Where is the {items[0].name}?", items[0].quarter


def _relation(rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    """Two items of one row or one column, and perhaps a third elsewhere: the answer is one of four directions."""
    line, (first, second) = int(rng.integers(GRID)), rng.choice(GRID, 2, replace=False).tolist()
    horizontal = bool(rng.integers(2))
    items = _items(rng, int(rng.integers(2, 4)))
    cells = [(line, first), (line, second)] if horizontal else [(first, line), (second, line)]
    cells += [cell for cell in _cells(rng, GRID**2) if cell not in cells][: len(items) - 2]
    placed = [
        Item(item.shape, item.colour, row, column, item.radius)
        for item, (row, column) in zip(items, cells, strict=True)
    ]
    before, after = ("left", "right") if horizontal else ("above", "below")
    question = f"Where is the {placed[0].name} relative to the {placed[1].name}?"
    return draw_scene(placed, rng), question, before if first < second else after


def _size(rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    items = _items(rng, 3)
    radii = (13.0, 9.5, 6.0)
    order = rng.permutation(3).tolist()
    sized = [Item(i.shape, i.colour, i.row, i.column, radii[r]) for i, r in zip(items, order, strict=True)]
    largest = bool(rng.integers(2))
    answer = sized[order.index(0 if largest else 2)].shape
    return draw_scene(sized, rng), f"Which shape is the {'largest' if largest else 'smallest'}?", answer


def _existence(rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    """Half yes; a no keeps the colour or the shape of something that is there, so that both must be looked at."""
    items = _items(rng, int(rng.integers(2, 5)))
    target, present = items[0], bool(rng.integers(2))
    name = target.name
    if not present and rng.random() < 0.5:
        name = f"{items[1].colour} {target.shape}"
    elif not present:
        name = f"{_sample(rng, [c for c in COLOURS if c != target.colour], 1)[0]} {target.shape}"
    article = "an" if name[0] in "aeiou" else "a"
    return draw_scene(items, rng), f"Is there {article} {name}?", "yes" if present else "no"


def _reading(rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    word = WORDS[rng.integers(len(WORDS))]
    row, column = int(rng.integers(GRID)), int(rng.integers(GRID + 1 - len(word)))
    return draw_word(word, row, column, rng), "What does the text say?", word


def _icon(rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    name = icon_names()[rng.integers(len(icon_names()))]
    return draw_icon(name, rng), "What is this icon?", name.replace("_", " ")


def _describe(rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    """A caption that names every item, row by row; the answer to the calibration instruction."""
    kind = rng.random()
    if kind < 0.15:
        image, _, answer = _reading(rng)
        return image, "Describe this image.", f'the text "{answer}"'
    if kind < 0.3:
        image, _, answer = _icon(rng)
        return image, "Describe this image.", f"an icon: {answer}"
    items = sorted(_items(rng, int(rng.integers(1, 4))), key=lambda i: (i.row, i.column))
    caption = ", ".join(f"{item.name} {item.quarter}" for item in items)
    return draw_scene(items, rng), "Describe this image.", caption


_MAKERS: dict[str, Callable[[np.random.Generator], tuple[Image.Image, str, str]]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "relation": _relation,
    "size": _size,
    "existence": _existence,
    "reading": _reading,
    "icon": _icon,
    "describe": _describe,
}
TASKS = tuple(task for task in _MAKERS if task != "describe")
"""The nine tasks that are scored; `describe` exists besides, for training and calibration."""


def stream(task: str, split: str, seed: int = 0) -> Iterator[Question]:
    """Endless questions of one task. Split, task and seed choose the stream, so splits never share one.

    Raises:
        SampleError: for a task or a split that does not exist.
    """
    if task not in _MAKERS:
        raise SampleError(f"no built-in task is called '{task}'; choose from {', '.join(_MAKERS)}")
    if split not in SPLITS:
        raise SampleError(f"no split is called '{split}'; choose from {', '.join(SPLITS)}")
    rng = np.random.default_rng([SPLITS.index(split), crc32(task.encode()), seed])
    while True:
        yield Question(task, *_MAKERS[task](rng))


def questions(task: str, split: str, n: int, seed: int = 0) -> list[Question]:
    """The first `n` questions of :func:`stream`."""
    source = stream(task, split, seed)
    return [next(source) for _ in range(n)]
