"""The parts of evaluation that need no model: window plans, questions, inference on counts, memory."""

import json
import math
import mmap
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spectrim.demo.tasks import TASKS
from spectrim.errors import CheckpointError, SampleError
from spectrim.evaluate import (
    Question,
    load_questions,
    mcnemar,
    normalise,
    paired_difference,
    plan_windows,
    wilson,
)
from spectrim.evaluate.footprint import PeakMemory, stored_bytes
from spectrim.evaluate.questions import blind_questions


@given(st.integers(0, 300), st.integers(1, 60), st.data())
def test_windows_count_every_prediction_once(predictions: int, seqlen: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, seqlen))
    windows = plan_windows(predictions, seqlen, stride)
    assert [p for w in windows for p in range(w.score, w.end)] == list(range(predictions))
    assert {w.end - w.begin for w in windows} <= {min(seqlen, predictions)}
    assert all(w.score - w.begin >= seqlen - stride for w in windows[1:])
    assert len(windows) == (predictions > 0) + max(0, math.ceil((predictions - seqlen) / stride))


@pytest.mark.parametrize("stride", [0, 9])
def test_stride_out_of_range(stride: int) -> None:
    with pytest.raises(SampleError, match="stride"):
        plan_windows(10, 8, stride)


def test_normalisation() -> None:
    assert normalise(" Straße. ") == normalise("STRASSE")
    assert normalise("3.5") == "3.5"
    assert normalise("yes..") != normalise("yes")


images = st.builds(lambda grey: Image.new("RGB", (2, 2), (grey, 0, 0)), st.integers(0, 5))


@given(st.lists(st.builds(Question, st.sampled_from("ab"), images, st.text(), st.text()), min_size=1, max_size=30))
def test_blind_questions_swap_every_image_inside_its_task(questions: list[Question]) -> None:
    pixels = {task: sorted(q.image.tobytes() for q in questions if q.task == task) for task in "ab"}
    if any(2 * p.count(most) > len(p) for p in pixels.values() for most in p):
        with pytest.raises(SampleError, match="share one image"):
            blind_questions(questions)
        return
    swapped = blind_questions(questions)
    assert [(q.task, q.question, q.answer) for q in swapped] == [(q.task, q.question, q.answer) for q in questions]
    assert all(a.image.tobytes() != b.image.tobytes() for a, b in zip(swapped, questions, strict=True))
    assert pixels == {task: sorted(q.image.tobytes() for q in swapped if q.task == task) for task in "ab"}


def test_questions_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    lines = []
    for number in range(12):
        Image.new("RGB", (3, 2), (number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
        record = {"image": f"pictures/{number}.png", "question": f"{number}?", "answer": f"{number}!"}
        lines.append(json.dumps(record | ({"task": "odd"} if number % 2 else {})))
    (tmp_path / "suite.jsonl").write_text("\n".join(lines) + "\n\n")
    everything = load_questions(str(tmp_path / "suite.jsonl"), 100, 0)
    assert [q.question for q in everything] == [f"{n}?" for n in (*range(0, 12, 2), *range(1, 12, 2))]
    assert [q.task for q in everything] == ["suite"] * 6 + ["odd"] * 6
    for q in everything:
        assert q.answer == q.question.replace("?", "!")
        assert q.image.mode == "RGB"
        assert q.image.getpixel((0, 0)) == (int(q.question[:-1]), 0, 0)
    few = [load_questions(str(tmp_path / "suite.jsonl"), 3, seed) for seed in (1, 1, 2, 3)]
    assert all([q.task for q in part] == ["suite"] * 3 + ["odd"] * 3 for part in few)
    asked = [[q.question for q in part] for part in few]
    assert asked[0] == asked[1]
    assert len({tuple(part) for part in asked}) > 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is not a JSON object"),
        ('{"image": "a.png", "question": "?"}', '"answer"'),
        ('{"image": "a.png", "question": "?", "answer": 3}', '"answer"'),
        ('{"image": "a.png", "question": "?", "answer": "3", "task": ""}', '"task"'),
        (
            '{"image": "a.png", "question": "?", "answer": "3"}',
            r"line 1 names the image 'a\.png', which does not",
        ),
        ("", "holds no question"),
    ],
)
def test_malformed_questions_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(SampleError, match=message):
        load_questions(str(tmp_path / "q.jsonl"), 10, 0)
    with pytest.raises(SampleError, match="no source of questions"):
        load_questions(str(tmp_path / "other.csv"), 10, 0)


def test_built_in_questions() -> None:
    questions = load_questions("builtin", 2, 7)
    assert [q.task for q in questions] == [task for task in TASKS for _ in range(2)]
    again = load_questions("builtin", 2, 7)
    assert [q.image.tobytes() for q in again] == [q.image.tobytes() for q in questions]
    with pytest.raises(SampleError, match="samples"):
        load_questions("builtin", 0, 7)


# Inference on counts


@given(st.integers(1, 400), st.data())
def test_wilson_ends_solve_the_score_equation(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = wilson(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    for end in (low, high):
        distance = abs(correct / total - end)
        assert distance == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / total), abs=1e-9)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 2), (0, 7), (2, 6), (5, 5)])
def test_mcnemar_equals_the_enumeration_of_all_signs(gained: int, lost: int) -> None:
    n = gained + lost
    extreme = [signs for signs in product((-1, 1), repeat=n) if abs(sum(signs)) >= abs(gained - lost)]
    assert mcnemar(gained, lost) == pytest.approx(len(extreme) / 2**n)


@pytest.mark.parametrize(("gain", "loss"), [(0.0, 0.0), (0.02, 0.1), (0.1, 0.1), (0.05, 0.4), (0.3, 0.2)])
def test_paired_interval_covers_the_true_difference(gain: float, loss: float) -> None:
    n, covered = 30, 0.0
    for up in range(n + 1):
        for down in range(n + 1 - up):
            same = n - up - down
            ways = math.comb(n, up) * math.comb(n - up, down)
            chance = ways * gain**up * loss**down * (1 - gain - loss) ** same
            if chance > 0:
                pairs = [(True, False)] * up + [(False, True)] * down + [(True, True)] * same
                difference = paired_difference(*zip(*pairs, strict=True))
                covered += chance * (difference.low <= gain - loss <= difference.high)
    assert 0.94 <= covered <= 1 + 1e-9


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_paired_difference_is_antisymmetric(pairs: list[tuple[bool, bool]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    there, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert there.mean == pytest.approx(sum(ours) / len(ours) - sum(theirs) / len(theirs))
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))
    assert there.p_value == back.p_value
    assert (there.gained, there.lost) == (back.lost, back.gained)


def test_unpaired_answers_are_refused() -> None:
    with pytest.raises(SampleError, match="same questions"):
        paired_difference([True], [True, False])
    with pytest.raises(SampleError, match="at least one question"):
        wilson(0, 0)


def test_stored_bytes_follow_the_index(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        stored_bytes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "adapter.safetensors").write_bytes(b"x" * 10)
    assert stored_bytes(tmp_path) == 100
    (tmp_path / "model.safetensors").unlink()  # which transformers would read, whatever an index says
    shards = {"a.weight": "one.safetensors", "b.weight": "two.safetensors", "c.weight": "one.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (tmp_path / "one.safetensors").write_bytes(b"x" * 7)
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        stored_bytes(tmp_path)
    (tmp_path / "two.safetensors").write_bytes(b"x" * 5)
    assert stored_bytes(tmp_path) == 12


def touch(size: int) -> None:
    """Take pages from the system and give them back; an allocator may have some that it got for an earlier test."""
    with mmap.mmap(-1, size) as pages:
        pages[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)


def test_peak_memory_is_that_of_the_block() -> None:
    with PeakMemory() as large:
        touch(128 * 2**20)
    with PeakMemory() as small:
        touch(4 * 2**20)
    if large.memory.peak_rss is None:
        pytest.skip("this platform cannot reset the high-water mark")
    assert large.memory.peak_rss - large.memory.start_rss >= 120 * 2**20
    assert small.memory.peak_rss - small.memory.start_rss <= 60 * 2**20
