"""Samples: windows, sources, batches, fingerprints, and the messages for what is wrong with them."""

import itertools
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaProcessor

from helpers.samples import (
    FakeImage,
    fake_datasets,
    image_folder,
    llava_processor,
    noise,
    sample,
    word_tokenizer,
    write_jsonl,
)
from spectrim.errors import SampleError
from spectrim.samples import (
    ImageSample,
    data_fingerprint,
    image_batches,
    load_images,
    load_text,
    question,
    text_batches,
    text_windows,
)
from spectrim.samples.batches import image_prompt
from spectrim.samples.chat import texts
from spectrim.samples.named import NAMED


def asked(sample: ImageSample) -> str:
    (text,) = texts(sample.turns)
    return text


COUNTING = word_tokenizer(2000)  # the n-th word of TEXT is token n + 200: a window shows where it was cut
TEXT = " ".join(f"w{i}" for i in range(200, 1200))


@given(samples=st.integers(1, 30), seqlen=st.integers(2, 60), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_windows_are_disjoint_pieces_of_the_text(samples, seqlen, seed):
    """Each is BOS, which the tokenizer adds, and seqlen - 1 tokens of the text."""
    length = seqlen - 1
    if samples * length > 1000:
        with pytest.raises(SampleError, match=rf"1000 tokens, room for {1000 // length} windows of {seqlen}"):
            text_windows(TEXT, COUNTING, samples=samples, seqlen=seqlen, seed=seed)
        return
    windows = text_windows(TEXT, COUNTING, samples=samples, seqlen=seqlen, seed=seed)
    assert windows.dtype == torch.int64
    assert windows.shape == (samples, seqlen)
    assert (windows[:, 0] == 1).all()
    assert (windows[:, 1:].diff(dim=1) == 1).all()
    assert len(windows[:, 1:].unique()) == samples * length
    assert torch.equal(windows, text_windows(TEXT, COUNTING, samples=samples, seqlen=seqlen, seed=seed))


def test_windows_reach_every_part_of_the_text_and_differ_by_seed():
    starts = torch.cat([text_windows(TEXT, COUNTING, samples=5, seqlen=51, seed=s)[:, 1] for s in range(60)]) - 200
    counts = torch.histc(starts.float(), bins=10, min=0, max=950)
    assert (counts > 10).all()  # 30 are expected in each tenth
    assert len(starts.unique()) > 200


@pytest.mark.parametrize(("samples", "seqlen"), [(0, 4), (4, 0)])
def test_windows_need_positive_sizes(samples, seqlen):
    with pytest.raises(SampleError, match="at least 1"):
        text_windows(TEXT, COUNTING, samples=samples, seqlen=seqlen, seed=0)


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("Grüße\n", encoding="utf-8")
    (tmp_path / "a.md").write_text("# title")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert load_text(str(tmp_path / "a.txt")) == "Grüße\n"
    assert load_text(str(tmp_path / "a.md"), split="heldout") == "# title"
    assert load_text(str(tmp_path / "a.jsonl")) == "one\n\ntwo"


def test_built_in_text_has_disjoint_splits():
    """No paragraph of 40 characters or more is in two splits."""
    found = {}
    for split in ("train", "calibration", "heldout"):
        text = load_text("builtin", split=split)
        paragraphs = [" ".join(piece.split()) for piece in re.split(r"\n\s*\n", text)]
        found[split] = {paragraph for paragraph in paragraphs if len(paragraph) >= 40}
        assert len(text) > 10_000
        assert len(found[split]) > 100
    for one, other in itertools.combinations(found, 2):
        assert not found[one] & found[other], (one, other)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "is empty"),
        ("a.txt", b"ok \xff", "not UTF-8 .byte 3."),
        ("a.pdf", b"text", "ends in none of .txt, .md, .jsonl, .csv, .tsv and .parquet"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "line 3 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', 'line 1 has no string "text"'),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8 .byte 10."),
    ],
)
def test_bad_text_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SampleError, match=message):
        load_text(str(tmp_path / name))


def test_missing_sources_are_named(tmp_path):
    for source in (str(tmp_path / "no"), "./no", "no.txt", "no.jsonl", "no.CSV", "data/no.parquet", "no.png"):
        with pytest.raises(SampleError, match="does not exist"):
            load_text(source)
    with pytest.raises(SampleError, match="does not exist"):
        load_images("no.txt", samples=1, seed=0)
    with pytest.raises(SampleError, match="is a folder"):
        load_text(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "split", "call", "text"),
    [
        ("wikitext-2", "heldout", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", True), "a b\n\n\n\nc"),
        ("wikitext-103", "calibration", ("Salesforce/wikitext", "wikitext-103-raw-v1", "train", True), "a b\n\n\n\nc"),
        ("ptb", "heldout", ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "refs/convert/parquet"), "a b  c"),
        ("c4", "heldout", ("allenai/c4", "en", "validation", True), "a b  c"),
        ("c4", "train", ("allenai/c4", "en", "train", True), "a b  c"),
    ],
)
def test_data_sets_by_the_names_of_papers(monkeypatch, name, split, call, text):
    calls = fake_datasets(monkeypatch, [{NAMED[name].column: row, "url": "x"} for row in ("a b", "", "c")])
    assert load_text(name, split=split) == text
    assert calls == [call]


def test_a_named_data_set_ends_where_papers_end_and_gives_way_to_a_file(monkeypatch, tmp_path):
    fake_datasets(monkeypatch, [{"text": "w"}] * 1500)
    assert load_text("c4", split="heldout").count("w") == 1100
    assert load_text("c4", split="train").count("w") == 1500
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()
    with pytest.raises(SampleError, match="folder"):
        load_text("c4")


def test_text_of_a_data_set(monkeypatch):
    calls = fake_datasets(monkeypatch, [{"text": "a"}, {"text": "b"}])
    assert load_text("org/name:config:validation") == "a\n\nb"
    assert load_text("org/name", split="heldout") == "a\n\nb"
    assert load_text("org/name::train") == "a\n\nb"
    assert calls == [
        ("org/name", "config", "validation", True),
        ("org/name", None, "test", True),
        ("org/name", None, "train", True),
    ]
    with pytest.raises(SampleError, match="Bad split: none"):
        load_text("org/name::none")
    fake_datasets(monkeypatch, [{"body": "a"}])
    with pytest.raises(SampleError, match=r"no column 'text' or .* \(it has body\)"):
        load_text("org/name")


def test_images_of_a_data_set(monkeypatch, tmp_path):
    files = sorted(image_folder(tmp_path, 5).iterdir())
    rows = [{"image": file.read_bytes(), "question": f"q{i}", "answer": ["a"]} for i, file in enumerate(files)]
    fake_datasets(monkeypatch, rows, {"image": FakeImage()})
    samples = load_images("org/pictures", samples=3, seed=1)
    for found in samples:
        assert np.array_equal(found.images[0], noise(int(asked(found)[1:])))
        assert found.answer is None
    with pytest.raises(SampleError, match="has 5 images and 6 were asked for"):
        load_images("org/pictures", samples=6, seed=1)
    fake_datasets(monkeypatch, [{"image": "http://somewhere"}])
    with pytest.raises(SampleError, match="holds no images"):
        load_images("org/pictures", samples=1, seed=1)


def test_data_sets_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SampleError, match=r"spectrim\[eval\]"):
        load_text("org/name")


def test_folder_of_images(tmp_path):
    image_folder(tmp_path, 4)
    image_folder(tmp_path / "deeper", 2)
    (tmp_path / "notes.txt").write_text("no image")
    chosen = load_images(str(tmp_path), samples=6, seed=3, instruction="Look.")
    assert len(chosen) == 6
    assert {asked(sample) for sample in chosen} == {"Look."}
    again = load_images(str(tmp_path), samples=6, seed=3, instruction="Look.")
    other = load_images(str(tmp_path), samples=6, seed=4, instruction="Look.")
    assert [s.images[0].tobytes() for s in chosen] == [s.images[0].tobytes() for s in again]
    assert [s.images[0].tobytes() for s in chosen] != [s.images[0].tobytes() for s in other]
    assert [s.images[0].tobytes() for s in chosen[2:4]] == [s.images[0].tobytes() for s in chosen][2:4]
    with pytest.raises(SampleError, match="has 6 images and 7 were asked for"):
        load_images(str(tmp_path), samples=7, seed=3)
    with pytest.raises(SampleError, match="at least 1"):
        load_images(str(tmp_path), samples=0, seed=3)


def test_every_mode_becomes_rgb(tmp_path):
    noise(0).convert("L").save(tmp_path / "grey.png")
    noise(0).convert("RGBA").save(tmp_path / "alpha.png")
    noise(0).convert("P").save(tmp_path / "palette.png", transparency=bytes(range(200)))
    assert {sample.images[0].mode for sample in load_images(str(tmp_path), samples=3, seed=0)} == {"RGB"}


def test_broken_image_is_named_when_opened(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    samples = load_images(str(tmp_path), samples=1, seed=0)
    with pytest.raises(SampleError, match=r"broken\.png cannot be read as an image"):
        samples[0]


def test_jsonl_of_images(tmp_path):
    image_folder(tmp_path / "pictures", 3)
    rows = [
        {"image": "pictures/000.png", "instruction": "i"},
        {"image": "pictures/001.png", "question": "q", "answer": "a"},
        {"image": "pictures/002.png"},
    ]
    samples = load_images(write_jsonl(tmp_path / "s.jsonl", rows), samples=3, seed=0, instruction="d")
    assert {(asked(s), s.answer) for s in samples} == {("i", None), ("q", "a"), ("d", None)}
    assert all(np.array_equal(s.images[0], noise("iqd".index(asked(s)))) for s in samples)


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"prompt": "p"}, "p", None),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"instruction": None, "question": "q", "answer": None, "completion": "c"}, "q", "c"),
        ({"caption": "c"}, "d", "c"),
        ({"caption": "c", "answer": "a"}, "d", "a"),
        ({"caption": "c", "question": "q"}, "q", None),  # says what is there, not what was asked
        ({"images": []}, "d", None),
    ],
)
def test_what_is_asked_and_its_answer_have_several_names(tmp_path, row, question, answer):
    image_folder(tmp_path, 1)
    source = write_jsonl(tmp_path / "s.jsonl", [{"image": "000.png", **row}])
    (sample,) = load_images(source, samples=1, seed=0, instruction="d")
    assert (asked(sample), sample.answer) == (question, answer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"picture": "000.png"}, 'line 2 has no string "image"'),
        ({"image": "999.png"}, "line 2 names the image '999.png', which does not exist"),
        ({"image": "000.png", "question": 7}, "line 2: what is asked and its answer must be strings"),
        ({"image": "000.png", "answer": 7}, "line 2: what is asked and its answer must be strings"),
        ({"image": "000.png", "caption": 7}, "line 2: what is asked and its answer must be strings"),
        ({"image": "000.png", "prompt": "p", "question": "q"}, 'line 2 has both "question" and "prompt"'),
    ],
)
def test_bad_jsonl_of_images_names_the_line(tmp_path, row, message):
    image_folder(tmp_path, 1)
    source = write_jsonl(tmp_path / "s.jsonl", [{"image": "000.png"}, row])
    with pytest.raises(SampleError, match=message):
        load_images(source, samples=1, seed=0)


def test_image_source_of_the_wrong_kind(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(SampleError, match="neither a folder of images nor"):
        load_images(str(tmp_path / "a.txt"), samples=1, seed=0)


def test_built_in_images_carry_the_instruction():
    samples = load_images("builtin", samples=5, seed=0, instruction="Say it.")
    assert [asked(s) for s in samples] == ["Say it."] * 5
    assert len({s.images[0].tobytes() for s in samples}) == 5
    again = load_images("builtin", samples=5, seed=0)
    assert [s.images[0].tobytes() for s in samples] == [s.images[0].tobytes() for s in again]


def test_prompt_follows_the_chat_template():
    processor = llava_processor()
    assert image_prompt(processor, "w3 w4") == "<s><image> w3 w4 w99"
    (batch,) = image_batches([sample(0, "w3 w4")], processor, 1)
    assert batch.inputs["input_ids"].tolist() == [[1, *[120] * 16, 3, 4, 99]]  # and not two of token 1


def test_prompt_without_chat_template_has_the_image_token_in_front():
    processor = llava_processor(chat_template=None)
    (batch,) = image_batches([sample(0, "w3 w4")], processor, 1)
    assert batch.inputs["input_ids"].tolist() == [[1, *[120] * 16, 3, 4]]
    processor.image_token = None
    with pytest.raises(SampleError, match="neither a chat template nor an image token"):
        image_prompt(processor, "w3")


def test_labels_of_a_processor_do_not_reach_the_model():
    class Labelling(LlavaProcessor):  # as PaliGemma's does
        def __call__(self, **arguments):
            inputs = super().__call__(**arguments)
            inputs["labels"] = inputs["input_ids"]
            return inputs

    plain = llava_processor()
    processor = Labelling(plain.image_processor, plain.tokenizer, 4, "default", num_additional_image_tokens=1)
    (batch,) = image_batches([sample(0, "w3")], processor, 1)
    assert set(batch.inputs) == {"input_ids", "attention_mask", "pixel_values"}


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=25), batch_size=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_image_batches_hold_every_sample_once_and_never_padding(lengths, batch_size):
    def samples():
        for number, length in enumerate(lengths):
            opened.append(number)
            yield sample(number, " ".join(["w5"] * length))

    processor, opened, seen = llava_processor(), [], []
    for batch in image_batches(samples(), processor, batch_size):
        assert batch.modality == "image"
        assert 1 <= batch.samples == len(batch.inputs["input_ids"]) <= batch_size
        assert batch.inputs["attention_mask"].all()
        for ids, pixels in zip(batch.inputs["input_ids"], batch.inputs["pixel_values"], strict=True):
            seen.append((int((ids == 5).sum()), pixels.numpy().tobytes()))
        assert len(opened) - len(seen) <= 5 * batch_size  # waiting is bounded
    alone = [next(image_batches([sample(i, "w5")], processor, 1)) for i in range(len(lengths))]
    expected = [(n, b.inputs["pixel_values"][0].numpy().tobytes()) for n, b in zip(lengths, alone, strict=True)]
    assert sorted(seen) == sorted(expected)


def test_text_batches():
    windows = torch.arange(21).reshape(7, 3)
    batches = list(text_batches(windows, 3))
    assert [b.samples for b in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([b.inputs["input_ids"] for b in batches]), windows)
    assert all(b.modality == "text" and b.inputs["attention_mask"].all() for b in batches)


def test_data_fingerprint_sees_all_content():
    windows = torch.arange(12).reshape(3, 4)
    images = [sample(i, "w5 w6", "yes") for i in range(2)]
    processor = llava_processor()
    brighter = noise(1)
    brighter.putpixel((3, 3), (1, 2, 3))
    changed = windows.clone()
    changed[2, 3] = 0
    variants = [
        (windows, images, processor),
        (changed, images, processor),
        (windows.reshape(4, 3), images, processor),
        (None, images, processor),
        (windows, [], None),
        (windows, images[::-1], processor),
        (windows, [images[0], replace(images[1], images=(brighter,))], processor),
        (windows, [images[0], replace(images[1], turns=question("w7"))], processor),
        (windows, [images[0], replace(images[1], answer=None)], processor),
        (windows, images, llava_processor(chat_template=None)),
    ]
    prints = [data_fingerprint(*variant) for variant in variants]
    assert len(set(prints)) == len(variants)
    assert prints[0] == data_fingerprint(windows.clone(), list(images), llava_processor())
