"""Rows of csv and parquet files: the same samples as from jsonl, columns by name, and what is malformed."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.samples import FakeImage, fake_datasets, image_folder, noise, word_tokenizer, write_jsonl
from spectrim.checks import check_sources
from spectrim.errors import SampleError
from spectrim.evaluate.questions import load_questions
from spectrim.samples import load_images, load_text
from spectrim.samples.tables import read_rows

TEMPLATE = "{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"
TURNS = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4 w5"}]


def write_csv(path: Path, rows: list[dict[str, object]], delimiter: str = ",") -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, object]], **options) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def png(seed: int) -> bytes:
    content = io.BytesIO()
    noise(seed).save(content, "png")
    return content.getvalue()


WRITERS = {
    "csv": write_csv,
    "tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "parquet": write_parquet,
    "jsonl": write_jsonl,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_text_by_column(tmp_path, kind):
    rows = [{"id": 1, "text": 'one, "two"\nthree', "body": "x"}, {"id": 2, "text": "Grüße", "body": "y"}]
    source = WRITERS[kind](tmp_path / f"a.{kind}", rows)
    assert load_text(source) == 'one, "two"\nthree\n\nGrüße'
    assert load_text(f"{source}[body]") == load_text(f"{source}[text=body]") == "x\n\ny"
    with pytest.raises(SampleError, match=r"no column 'none'|line 1 has no string"):
        load_text(f"{source}[none]")
    with pytest.raises(SampleError, match="names columns by 'picture=body'; write KEY=COLUMN, with a key of text"):
        load_text(f"{source}[picture=body]")
    with pytest.raises(SampleError, match="names a column for text twice"):
        load_text(f"{source}[text=body,text=text]")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("nested", [False, True])
def test_conversations(tmp_path, kind, nested):
    turns = TURNS if kind == "jsonl" or (nested and kind == "parquet") else json.dumps(TURNS)
    source = WRITERS[kind](tmp_path / f"a.{kind}", [{"messages": turns, "chat": turns}])
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for name in (source, f"{source}[messages=chat]"):
        assert load_text(name, processor=tokenizer) == " user w3 assistant w4 w5"
        check_sources(name, None)  # which has no tokenizer yet


@pytest.mark.parametrize("kind", WRITERS)
def test_images_by_path(tmp_path, kind):
    image_folder(tmp_path / "pictures", 3)
    rows = [{"image": f"pictures/{i:03}.png", "question": f"q{i}", "answer": f"a{i}", "no": "n"} for i in range(3)]
    as_jsonl = load_images(write_jsonl(tmp_path / "s.jsonl", rows), samples=3, seed=5)
    source = WRITERS[kind](tmp_path / f"s.{kind}", rows)
    found = load_images(source, samples=3, seed=5)
    assert [(s.turns, s.answer) for s in found] == [(s.turns, s.answer) for s in as_jsonl]
    assert all(np.array_equal(s.images[0], noise(int(s.answer[1:]))) for s in found)
    (one,) = load_images(f"{source}[image=image,caption=no]", samples=1, seed=0, instruction="d")
    assert one.answer == "n"
    assert load_questions(source, 9, 0)[1].question == "q1"
    assert load_questions(f"{source}[image=image,question=no,answer=no]", 9, 0)[1].question == "n"


def test_images_inside_a_parquet_file(tmp_path):
    image_folder(tmp_path, 5)
    rows = [{"image": {"bytes": png(i), "path": f"{i}.png"}, "pic": png(i), "answer": f"{i}"} for i in range(4)]
    rows.append({"image": {"bytes": None, "path": "004.png"}, "pic": png(4), "answer": "4"})
    source = write_parquet(tmp_path / "s.parquet", rows, row_group_size=2)
    for name in (source, f"{source}[image=pic,answer=answer]"):
        found = load_images(name, samples=5, seed=2)
        assert sorted(s.answer for s in found) == [*"01234"]
        assert all(np.array_equal(s.images[0], noise(int(s.answer))) for s in found)
    assert [s.answer for s in load_images(source, samples=2, seed=2)] == [
        s.answer for s in load_images(write_jsonl(tmp_path / "s.jsonl", [
            {"image": f"{i:03}.png", "answer": f"{i}"} for i in range(5)
        ]), samples=2, seed=2)
    ]  # fmt: skip
    asked = [{"image": row["image"], "question": "q", "answer": row["answer"]} for row in rows]
    questions = load_questions(write_parquet(tmp_path / "q.parquet", asked), 9, 0)
    assert np.array_equal(questions[3].image, noise(3))
    lists = write_parquet(tmp_path / "l.parquet", [{"images": [row["image"] for row in rows[:2]], "question": "q"}])
    assert len(load_images(lists, samples=1, seed=0)[0].images) == 2


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r")), min_size=1, max_size=5))
def test_csv_gives_back_what_was_written(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    write_csv(path, [{"text": cell, "id": 0} for cell in cells])
    assert [row["text"] for _, row in read_rows(path, ("text",), {})] == cells


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"a\.csv has no column 'text', .* \(it has none\)"),
        ("a.csv", b"body,id\nx,1\n", r"no column .* \(it has body, id\); name one that it has, as in 'a\.csv\[body\]'"),
        ("a.csv", b"text,id\nx,1\ny\n", r"a\.csv, row 2 has 1 fields and the header 2"),
        ("a.csv", b"text,id\nx,1\nplain, text,2\n", "row 2 has 3 fields"),
        ("a.csv", b'text\nx\n"y" z\n', "row 2 is not CSV .*; correct its quotes"),
        ("a.csv", b'text\nx\n"y', "row 2 is not CSV"),
        ("a.csv", b"text\nx\xff\n", r"a\.csv is not UTF-8 \(byte 6\)"),
        ("a.csv", b"text\n\n", "is empty"),
        ("a.csv", b'messages\n"[{""role"": ""user""}"\n', 'row 1: "messages" is not JSON .*write a list of turns'),
        ("a.csv", b"messages\nhello\n", "row 1: .* must be a list of turns"),
        ("a.csv", b'text,messages\nx,"[{}]"\n', "row 1 has a turn of None"),
        ("a.parquet", b"PAR1 no more", r"a\.parquet cannot be read as a parquet file .*; repair or replace it"),
        ("a.parquet", b"", "cannot be read as a parquet file"),
    ],
)
def test_malformed_tables_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SampleError, match=message):
        check_sources(str(tmp_path / name), None)


def test_malformed_rows_of_parquet_files_are_named(tmp_path):
    image_folder(tmp_path, 1)
    with pytest.raises(SampleError, match=r"t\.parquet, row 2 has no string .text."):
        load_text(write_parquet(tmp_path / "t.parquet", [{"text": "x"}, {"text": None}]))
    with pytest.raises(SampleError, match=r"n\.parquet, row 1 has no string .text."):
        load_text(write_parquet(tmp_path / "n.parquet", [{"text": 5}]))
    missing = write_parquet(tmp_path / "i.parquet", [{"image": "000.png"}, {"image": "999.png"}])
    with pytest.raises(SampleError, match=r"i\.parquet, row 2 names the image '999\.png', which does not exist"):
        load_images(missing, samples=1, seed=0)
    broken = load_images(write_parquet(tmp_path / "b.parquet", [{"image": b"no image"}]), samples=1, seed=0)
    with pytest.raises(SampleError, match=r"an image of .*b\.parquet, row 1 cannot be read as an image"):
        broken[0]
    damaged = tmp_path / "d.parquet"
    write_parquet(damaged, [{"text": "word " * 50} for _ in range(300)], compression="none", use_dictionary=False)
    content = bytearray(damaged.read_bytes())
    content[4:40] = b"\xff" * 36
    damaged.write_bytes(content)
    with pytest.raises(SampleError, match=r"d\.parquet cannot be read as a parquet file"):
        load_text(str(damaged))


def test_parquet_needs_its_package(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "t.parquet", [{"text": "x"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SampleError, match=r"t\.parquet needs the package pyarrow: pip install 'spectrim\[eval\]'"):
        check_sources(source, None)
    write_csv(tmp_path / "t.csv", [{"text": "x"}])
    assert load_text(str(tmp_path / "t.csv")) == "x"  # csv needs nothing


def test_columns_of_data_sets(monkeypatch):
    fake_datasets(monkeypatch, [{"body": "a", "text": "no"}, {"body": "b", "text": "no"}])
    assert load_text("org/name:config[body]") == "a\n\nb"
    fake_datasets(monkeypatch, [{"photo": png(1), "ask": "q"}], {"photo": FakeImage()})
    (found,) = load_images("org/name[image=photo,question=ask]", samples=1, seed=0)
    assert np.array_equal(found.images[0], noise(1))


def test_columns_where_there_are_none_are_named(tmp_path, words):
    with pytest.raises(SampleError, match="has no columns; leave out those in brackets"):
        load_text(f"{words}[text]")
    with pytest.raises(SampleError, match="neither a folder of images nor"):
        load_images(f"{image_folder(tmp_path / 'p', 1)}[image]", samples=1, seed=0)
    (tmp_path / "a[1].txt").write_text("text")  # a name of a file that is there is a name
    assert load_text(str(tmp_path / "a[1].txt")) == "text"
