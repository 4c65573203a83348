"""Several sources of samples with weights: their shares, what is refused, and what statistics remember."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import FAMILIES
from helpers.samples import WORDS, image_folder, llava_processor, word_tokenizer, write_jsonl
from spectrim.calibrate import calibrate
from spectrim.calibrate.data import reload_data
from spectrim.calibrate.manifest import DataPrint
from spectrim.checkpoint import read_provenance
from spectrim.checks import check_sources
from spectrim.errors import SampleError, StatisticsError
from spectrim.pipeline import compress
from spectrim.samples import load_images, load_text, load_windows, text_windows
from spectrim.settings import CalibrationOptions, counts, split_weight

weights = st.none() | st.integers(1, 50) | st.floats(0.001, 50, allow_nan=False)


@given(st.lists(weights, min_size=2, max_size=6), st.integers(0, 500))
def test_counts_add_up_and_lie_within_one_of_the_shares(given_weights, samples):
    names = [f"{'x:' * number}s{number}" for number in range(len(given_weights))]
    if None in given_weights:  # weights of some leave room for the others
        given_weights = [weight and weight / 1000 for weight in given_weights]
    options = CalibrationOptions.checked(text=list(zip(names, given_weights, strict=True)), samples=1000)
    found = counts(options.text, samples)
    assert list(found) == names
    assert sum(found.values()) == samples
    given_sum = sum(Fraction(repr(w)) for w in given_weights if w is not None)
    free = given_weights.count(None)
    shares = [(1 - given_sum) / free if w is None else Fraction(repr(w)) for w in given_weights]
    for name, share in zip(names, shares, strict=True):
        assert abs(found[name] - samples * share / sum(shares)) < 1
    assert found == counts(options.text, samples)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ("a", {"a": 10}),
        (("a", "b"), {"a": 5, "b": 5}),
        (("a", "b", "c"), {"a": 4, "b": 3, "c": 3}),
        (("a:0.7", "b:0.3"), {"a": 7, "b": 3}),
        (("a:0.7", "b"), {"a": 7, "b": 3}),
        (("a:7", "b:3"), {"a": 7, "b": 3}),
        (("a:0.5", "b", "c"), {"a": 5, "b": 3, "c": 2}),
        (("a:0.01", "b"), {"a": 0, "b": 10}),
    ],
)
def test_counts_of_ten(sources, expected):
    assert counts(sources, 10) == expected


@pytest.mark.parametrize(
    ("source", "name", "weight"),
    [
        ("Salesforce/wikitext:wikitext-2-raw-v1:train", "Salesforce/wikitext:wikitext-2-raw-v1:train", None),
        ("Salesforce/wikitext:wikitext-2-raw-v1:train:0.5", "Salesforce/wikitext:wikitext-2-raw-v1:train", 0.5),
        ("org/news:3.0.0", "org/news:3.0.0", None),
        ("org/news:3.0.0:2", "org/news:3.0.0", 2),
        (r"C:\texts\a.txt", r"C:\texts\a.txt", None),
        (r"C:\texts\a.txt:.25", r"C:\texts\a.txt", 0.25),
        ("a.parquet[content]:1e-2", "a.parquet[content]", 0.01),
        ("a:-1", "a:-1", None),
        ("a:nan", "a:nan", None),
        (":1", ":1", None),
    ],
)
def test_only_a_number_after_the_last_colon_is_a_weight(source, name, weight):
    found = split_weight(source)
    assert found == (name, None if weight is None else Fraction(str(weight)))


def test_sources_may_be_strings_or_pairs():
    for several in (["a:0.7", "b"], [("a", 0.7), "b"], (("a", 0.7), ("b", None))):
        assert CalibrationOptions.checked(text=several).text == ("a:0.7", "b")
    assert CalibrationOptions.checked(text=["a"]).text == CalibrationOptions.checked(text=[("a", 3)]).text == "a"
    assert CalibrationOptions.checked(images=None).images is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "text needs a source"),
        ([""], "text cannot be ''"),
        (["a", "b", "a:2"], "text names 'a' twice"),
        (["a", "none"], "text names sources and 'none'"),
        (["a:0", "b"], "text gives 'a' the weight 0"),
        (["a:1", "b"], "text gives the whole to some sources"),
        ([("a", -1), "b"], r"text cannot be \('a', -1\)"),
        ([("a", float("nan")), "b"], r"text cannot be \('a', nan\)"),
        (("a", 0.7), "text cannot be 0.7"),
        (7, "text needs a source"),
    ],
)
def test_mixtures_that_cannot_be_are_named(value, message):
    with pytest.raises(SampleError, match=message):
        CalibrationOptions.checked(text=value)


def test_a_source_that_gives_nothing_is_named():
    options = CalibrationOptions.checked(text=["a:0.01", "b"], samples=8)
    with pytest.raises(SampleError, match=r"of 8 samples none is left for 'a' \(text\)"):
        options.check_together()


def test_a_weight_alone_is_named(words, tmp_path):
    for source in (f"{words}:0.7", "builtin:1"):
        with pytest.raises(SampleError, match="has no effect without a second source"):
            check_sources(source, None)
    with pytest.raises(SampleError, match=r"none\.txt' does not exist"):
        check_sources((words, str(tmp_path / "none.txt:2")), None)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    """Two texts without a word in common."""
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text(" ".join(f"w{2 + i % 30}" for i in range(400)))
    two.write_text(" ".join(f"w{50 + i % 30}" for i in range(400)))
    return str(one), str(two)


def test_windows_of_several_texts_are_those_of_each_in_random_order(texts):
    tokenizer = word_tokenizer()
    alone = text_windows(load_text(texts[0]), tokenizer, samples=8, seqlen=10, seed=3)
    assert torch.equal(load_windows(texts[0], tokenizer, samples=8, seqlen=10, seed=3), alone)
    mixed = load_windows((f"{texts[0]}:3", f"{texts[1]}:1"), tokenizer, samples=16, seqlen=10, seed=3)
    first = mixed[:, 1] < 50
    assert first.sum() == 12
    assert not first[:12].all()  # shuffled: a prefix of the samples has both
    expected = [
        text_windows(load_text(text), tokenizer, samples=n, seqlen=10, seed=3)
        for text, n in zip(texts, (12, 4), strict=True)
    ]
    assert sorted(mixed.tolist()) == sorted(torch.cat(expected).tolist())
    with pytest.raises(SampleError, match=r"text source '.*two\.txt': the text has 400 tokens"):
        load_windows((f"{texts[0]}:0.1", texts[1]), tokenizer, samples=64, seqlen=10, seed=3)


def test_images_of_several_sources(tmp_path):
    one, two = image_folder(tmp_path / "one", 6), image_folder(tmp_path / "two", 6)
    sources = (f"{one}:2", f"{two}:1")
    found = load_images(sources, samples=6, seed=1)
    where = [Path(entry.where).parent.name for entry in found.entries]
    assert sorted(where) == ["one"] * 4 + ["two"] * 2
    assert where != sorted(where)
    assert [e.where for e in load_images(sources, samples=6, seed=1).entries] == [e.where for e in found.entries]
    with pytest.raises(SampleError, match=r"two' has 6 images and 8 were asked for"):
        load_images((f"{one}:1", f"{two}:2"), samples=12, seed=1)


def test_statistics_remember_all_sources_and_weights(texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "one", 4)
    row = {"picture": "one/001.png", "question": "w7"}
    write_jsonl(tmp_path / "two.jsonl", [row] * 4)
    model, processor = FAMILIES["llava"](), llava_processor()
    options = {
        "text": ["one.txt:0.75", "two.txt:0.25"],
        "images": [("one", 1), ("two.jsonl[image=picture,question=question]", 1)],
        "samples": 4, "seqlen": 8, "curvature": False,
    }  # fmt: skip
    statistics = calibrate(model, tmp_path / "s", processor=processor, **options)
    source = statistics.manifest.data
    assert source.text == (f"{texts[0]}:0.75", f"{texts[1]}:0.25")
    assert source.images == (f"{tmp_path}/one:1", f"{tmp_path}/two.jsonl[image=picture,question=question]:1")
    monkeypatch.chdir("/")
    again = reload_data(model, processor, statistics, sees=True, samples=None)
    assert again.fingerprint() == source.fingerprint
    with pytest.raises(StatisticsError, match=re.escape(f"text {texts[0]}:0.75 + {texts[1]}:0.25")):
        calibrate(model, tmp_path / "s", processor=processor, **{**options, "text": list(texts), "images": [
            str(tmp_path / "one"), f"{tmp_path}/two.jsonl[image=picture,question=question]",
        ]})  # fmt: skip
    compress(model, tmp_path / "out", recipe="jw-svd", retain=0.6, stats=statistics, processor=processor)
    record = read_provenance(tmp_path / "out")["data"]
    assert record["text"] == ["one.txt:0.75", "two.txt:0.25"]
    assert record["images"] == ["one:1", "two.jsonl[image=picture,question=question]:1"]
    assert "text from `one.txt:0.75` and `two.txt:0.25`, images from" in (tmp_path / "out" / "README.md").read_text()
    Path(texts[1]).unlink()
    with pytest.raises(SampleError, match=r"two\.txt is gone"):
        reload_data(model, processor, statistics, sees=True, samples=None)


def test_one_source_stands_in_the_manifest_as_before(words):
    one = DataPrint(text=words, images=None, fingerprint="x")
    assert json.loads(one.model_dump_json()) == {"text": words, "images": None, "fingerprint": "x"}
    several = DataPrint(text=("a:1", "b:2"), images=None, fingerprint="x")
    assert DataPrint.model_validate(several.model_dump(mode="json")) == several


def test_a_word_list_is_one_text(words):
    assert load_text(words) == WORDS
