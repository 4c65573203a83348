"""The built-in tasks and text: splits apart, answers right by looking at the pixels, deterministic."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from spectrim.demo import scene, tasks, text
from spectrim.demo.scene import COLOURS, GRID, SIZE, draw_icon, draw_word, icon_names
from spectrim.demo.tasks import SPLITS, TASKS, questions
from spectrim.errors import SampleError


def pixels_of(image: Image.Image) -> dict[str, np.ndarray]:
    """By colour of the palette: a mask of the pixels that are near it; colours with under ten pixels are left out."""
    values = np.asarray(image, dtype=int)
    masks = {name: np.abs(values - colour).max(-1) <= 6 for name, colour in COLOURS.items()}
    return {name: mask for name, mask in masks.items() if mask.sum() >= 10}


def centre(mask: np.ndarray) -> tuple[float, float]:
    row, column = np.argwhere(mask).mean(0)
    return float(row), float(column)


def cell(mask: np.ndarray) -> tuple[int, int]:
    row, column = centre(mask)
    return int(row * GRID / SIZE), int(column * GRID / SIZE)


def components(mask: np.ndarray) -> int:
    """Blobs of a mask in the cells of the grid: items never share a cell."""
    bands = np.array_split(np.arange(SIZE), GRID)
    return sum(mask[np.ix_(rows, columns)].sum() > 30 for rows in bands for columns in bands)


def widths(mask: np.ndarray) -> tuple[int, int]:
    rows, columns = np.argwhere(mask).T
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


@pytest.fixture
def record(monkeypatch):
    """The items of every scene, as they were drawn."""
    scenes = []

    def draw(items, rng):
        scenes.append(items)
        return scene.draw_scene(items, rng)

    monkeypatch.setattr(tasks, "draw_scene", draw)
    return scenes


def test_items_are_drawn_where_and_as_they_say(record):
    for task in ("colour", "shape", "position", "size", "relation", "existence"):
        for number, question in enumerate(questions(task, "test", 25, seed=3)):
            masks = pixels_of(question.image)
            items = record[-25 + number]
            for item in items:
                assert cell(masks[item.colour]) == (item.row, item.column), (task, number, item)
            assert len({(item.row, item.column) for item in items}) == len(items)
        record.clear()


def test_colour_and_shape_ask_for_each_other(record):
    for task, key, wanted in (("colour", "shape", "colour"), ("shape", "colour", "shape")):
        record.clear()
        for question, items in zip(questions(task, "test", 40), record, strict=True):
            asked = [item for item in items if getattr(item, key) in question.question]
            assert [getattr(item, wanted) for item in asked] == [question.answer]


def test_position_is_where_the_colour_is():
    for question in questions("position", "test", 60):
        colour = question.question.removeprefix("Where is the ").split()[0]
        row, column = centre(pixels_of(question.image)[colour])
        assert question.answer == f"{'top' if row < SIZE / 2 else 'bottom'} {'left' if column < SIZE / 2 else 'right'}"


def test_relation_is_the_direction_between_the_two_colours():
    seen = Counter()
    for question in questions("relation", "test", 80):
        words = question.question.removeprefix("Where is the ").rstrip("?").split()
        masks = pixels_of(question.image)
        (row, column), (other_row, other_column) = centre(masks[words[0]]), centre(masks[words[5]])
        if abs(row - other_row) > abs(column - other_column):
            expected = "above" if row < other_row else "below"
        else:
            expected = "left" if column < other_column else "right"
        assert question.answer == expected
        seen[expected] += 1
    assert set(seen) == {"left", "right", "above", "below"}


def test_size_is_the_extent_on_the_canvas(record):
    for question, items in zip(questions("size", "test", 60), record, strict=True):
        masks = pixels_of(question.image)
        extents = {item.shape: max(widths(masks[item.colour])) for item in items}
        choose = max if "largest" in question.question else min
        assert question.answer == choose(extents, key=extents.get)


def test_count_is_the_number_of_items(record):
    for question, items in zip(questions("count", "test", 60), record, strict=True):
        noun = question.question.removeprefix("How many ").split()[0]
        named = [item for item in items if noun in (f"{item.shape}s", f"{item.shape}es")]
        assert question.answer == str(len(named))
        # All items, wanted or not, are on the canvas.
        drawn = Counter(item.colour for item in items)
        masks = pixels_of(question.image)
        assert {colour: components(masks[colour]) for colour in drawn} == drawn


def test_existence_is_about_colour_and_shape_together(record):
    answers = Counter()
    for question, items in zip(questions("existence", "test", 100), record, strict=True):
        colour, shape = question.question.rstrip("?").split()[-2:]
        present = any((item.colour, item.shape) == (colour, shape) for item in items)
        assert question.answer == ("yes" if present else "no")
        assert any(item.shape == shape for item in items)
        answers[question.answer] += 1
    assert min(answers.values()) > 25


@pytest.mark.parametrize("task", ["reading", "icon"])
def test_words_and_icons_are_visible(task):
    for question in questions(task, "test", 30):
        values = np.asarray(question.image, dtype=int)
        background = np.median(values.reshape(-1, 3), axis=0)
        assert (np.abs(values - background).max(-1) > 25).mean() > 0.005
    known = tasks.WORDS if task == "reading" else [name.replace("_", " ") for name in icon_names()]
    assert {question.answer for question in questions(task, "test", 30)} <= set(known)


def test_every_word_and_every_icon_draws():
    rng = np.random.default_rng(0)
    assert len(set(tasks.WORDS)) == len(tasks.WORDS)
    images = [draw_word(word, 0, 0, rng) for word in tasks.WORDS] + [draw_icon(name, rng) for name in icon_names()]
    assert {(image.mode, image.size) for image in images} == {("RGB", (SIZE, SIZE))}
    assert len(icon_names()) >= 30
    assert icon_names() == tuple(sorted(icon_names()))


def key(question) -> bytes:
    return question.image.tobytes() + question.question.encode()


@pytest.mark.parametrize("task", [*TASKS, "describe"])
def test_splits_and_seeds_are_apart_and_repeatable(task):
    drawn = {(split, seed): questions(task, split, 8, seed) for split in SPLITS for seed in (0, 1)}
    images = [key(question) for found in drawn.values() for question in found]
    assert len(set(images)) == len(images)
    for (split, seed), found in drawn.items():
        again = questions(task, split, 5, seed)
        assert [(key(q), q.answer) for q in again] == [(key(q), q.answer) for q in found[:5]]
        assert all(q.task == task and q.answer and q.image.size == (SIZE, SIZE) for q in found)


@pytest.mark.parametrize("task", TASKS)
def test_no_answer_is_right_most_of_the_time(task):
    answers = Counter(question.answer for question in questions(task, "test", 60))
    assert answers.most_common(1)[0][1] <= 40
    assert len(answers) > 1


def test_what_does_not_exist_is_named():
    with pytest.raises(SampleError, match="no built-in task is called 'smell'; choose from colour"):
        questions("smell", "test", 1)
    with pytest.raises(SampleError, match="no split is called 'tests'"):
        questions("colour", "tests", 1)
    with pytest.raises(SampleError, match="no split is called 'test'"):
        text.split_text("test")


def paragraphs(split: str) -> set[str]:
    return {" ".join(p.split()) for p in text.split_text(split).split("\n\n") if len(p.strip()) >= 40}


def test_text_splits_share_no_paragraph():
    found = {split: paragraphs(split) for split in text.SPLITS}
    assert all(len(p) >= 40 for p in found.values())
    for a, b in (("train", "calibration"), ("train", "heldout"), ("calibration", "heldout")):
        assert not found[a] & found[b], (a, b)
    assert len(text.split_text("train")) > 2 * len(text.split_text("heldout"))
