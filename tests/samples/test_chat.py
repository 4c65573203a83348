"""Conversations as samples: formats, images and their places, templates, and nothing lost in silence."""

import json
from pathlib import Path

import numpy as np
import pytest

import families
from helpers.samples import fake_datasets, image_folder, llava_processor, noise, word_tokenizer, write_jsonl
from spectrim.calibrate import calibrate
from spectrim.calibrate.data import load_data
from spectrim.errors import SampleError
from spectrim.samples import data_fingerprint, image_batches, load_images, load_text, text_windows
from spectrim.samples.chat import read_chat, render

# Of parts alone, as many are; `PLAIN` is of strings alone, `BOTH` of either.
PARTS = (
    "<s>{% for m in messages %} {{ m.role }}{% for c in m.content %}{% if c.type == 'image' %} <image>"
    "{% elif c.type == 'text' %} {{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)
PLAIN = "<s>{% for m in messages %} {{ m.role + ' ' + m.content }}{% endfor %}"
BOTH = (
    "<s>{% for m in messages %} {{ m.role }} {{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PARTS
ONE_IMAGE = "<s>{% for m in messages %}<image>{% for c in m.content %} {{ c.text }}{% endfor %}{% endfor %}"

SYSTEM, ASKED, SAID, AGAIN, LAST = "w3", "w4 w5", "w6", "w7", "w8 w9"


def part(text: str) -> dict:
    return {"type": "text", "text": text}


def turns(*contents, names=("role", "content"), roles=("system", "user", "assistant")) -> list[dict]:
    """A system turn, then user and assistant by turns."""
    who = [roles[0], *[roles[1 + i % 2] for i in range(len(contents) - 1)]]
    return [dict(zip(names, pair, strict=True)) for pair in zip(who, contents, strict=True)]


SHAREGPT = {"names": ("from", "value"), "roles": ("system", "human", "gpt")}
IMAGE, A, B = {"type": "image"}, "p/000.png", "p/001.png"
FORMATS = {  # the same conversation about two images, as data sets write it
    "parts": {
        "images": [A, B],
        "messages": turns([part(SYSTEM)], [IMAGE, part(ASKED)], [part(SAID)], [IMAGE, part(AGAIN)], [part(LAST)]),
    },
    "inline": {
        "messages": turns(
            SYSTEM,
            [{"type": "image", "image": A}, part(ASKED)],
            SAID,
            [{"type": "image_url", "image_url": {"url": B}}, part(AGAIN)],
            LAST,
        ),
    },
    "paths": {
        "messages": turns(
            SYSTEM,
            [{"type": "image", "path": A}, part(ASKED)],
            SAID,
            [{"type": "image_url", "image_url": B}, part(AGAIN)],
            LAST,
        ),
    },
    "without types": {
        "messages": turns(SYSTEM, [{"image": A}, {"text": ASKED}], SAID, [{"image": B}, {"text": AGAIN}], LAST)
    },
    "nulls": {  # as tables write what some rows have and others lack
        "image": None,
        "images": [A, B],
        "messages": turns(
            SYSTEM,
            [{**IMAGE, "text": None, "index": 0}, {**part(ASKED), "index": None}],
            SAID,
            [{**IMAGE, "text": None, "image": None}, {**part(AGAIN), "image": None}],
            LAST,
        ),
        "conversations": None,
        "answer": None,
    },
    "partly inline": {
        "image": A,
        "messages": turns(SYSTEM, [IMAGE, part(ASKED)], SAID, [{"type": "image", "url": B}, part(AGAIN)], LAST),
    },
    "llava": {
        "id": 7,
        "image": [A, B],
        "conversations": turns(SYSTEM, f"<image>\n{ASKED}", SAID, f"<image>\n{AGAIN}", LAST, **SHAREGPT),
    },
    "marks in messages": {
        "images": [A, B],
        "messages": turns(SYSTEM, f"<image>{ASKED}", SAID, f"<image>{AGAIN}", LAST),
    },
    "prompt and completion": {
        "images": [A, B],
        "prompt": turns([part(SYSTEM)], [IMAGE, part(ASKED)], [part(SAID)], [IMAGE, part(AGAIN)]),
        "completion": [{"role": "assistant", "content": LAST}],
    },
    "prompt alone": {
        "images": [A, B],
        "prompt": turns([part(SYSTEM)], [IMAGE, part(ASKED)], [part(SAID)], [IMAGE, part(AGAIN)], [part(LAST)]),
    },
    "system beside": {
        "image": [A, B],
        "system": SYSTEM,
        "conversations": turns(SYSTEM, f"<image>\n{ASKED}", SAID, f"<image>\n{AGAIN}", LAST, **SHAREGPT)[1:],
    },
    "counted": {
        "images": [B, A],
        "messages": turns(
            SYSTEM, [{**IMAGE, "index": 1}, part(ASKED)], SAID, [{**IMAGE, "index": 0}, part(AGAIN)], LAST
        ),
    },
    "answer beside": {
        "images": [A, B],
        "messages": turns(SYSTEM, f"<image>{ASKED}", SAID, f"<image>{AGAIN}"),
        "answer": LAST,
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image_folder(tmp_path / "p", 3)
    return tmp_path


def one(folder: Path, row: dict):
    (sample,) = load_images(write_jsonl(folder / "s.jsonl", [row]), samples=1, seed=0)
    return sample


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_the_same_sample(folder, form):
    sample, processor = one(folder, FORMATS[form]), llava_processor(PARTS)
    assert [np.array_equal(image, noise(i)) for i, image in enumerate(sample.images)] == [True, True]
    assert sample.answer == LAST
    (batch,) = image_batches([sample], processor, 1)
    image = [120] * 16
    reader = processor.tokenizer
    words = reader("system w3 user", add_special_tokens=False)["input_ids"]
    said = reader("assistant w6 user", add_special_tokens=False)["input_ids"]
    rest = reader("w7 assistant", add_special_tokens=False)["input_ids"]
    assert batch.inputs["input_ids"].tolist() == [[1, *words, *image, 4, 5, *said, *image, *rest]]
    assert batch.inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert batch.answers == (LAST,)


def test_an_image_without_a_place_stands_before_the_first_question(folder):
    row = {"image": A, "messages": [{"role": "user", "content": ASKED}]}
    plain = one(folder, {"image": A, "question": ASKED})
    assert one(folder, row).turns == plain.turns
    assert one(folder, {"images": [A], "instruction": ASKED}).turns == plain.turns
    assert one(folder, row).answer is None
    assert len(one(folder, {"images": [A, B], "question": ASKED}).images) == 2


def test_samples_with_several_images_and_turns_are_batched_and_told_apart(folder):
    rows = [FORMATS["parts"], {"image": A, "question": ASKED, "answer": SAID}, FORMATS["llava"]]
    samples = load_images(write_jsonl(folder / "s.jsonl", rows), samples=3, seed=0)
    processor = llava_processor(PARTS)
    batches = list(image_batches(samples, processor, 2))
    assert sorted(batch.samples for batch in batches) == [1, 2]
    pair = next(batch for batch in batches if batch.samples == 2)
    assert pair.inputs["pixel_values"].shape == (4, 3, 16, 16)
    prints = {data_fingerprint(None, [sample], processor) for sample in samples}
    assert len(prints) == 2  # the same conversation in two formats is one
    other = json.loads(json.dumps(FORMATS["parts"]))
    for change in ("system", "answer", "order"):
        changed = json.loads(json.dumps(other))
        if change == "system":
            changed["messages"][0]["content"][0]["text"] = "w2"
        elif change == "answer":
            changed["messages"][-1]["content"][0]["text"] = "w2"
        else:
            changed["images"].reverse()
        assert data_fingerprint(None, [one(folder, changed)], processor) not in prints


def test_conversations_reach_the_model_and_its_labels(folder):
    """Both images of a sample, and gradients at its answer and the end."""
    (folder / "words.txt").write_text(" ".join(f"w{i % 100 + 2}" for i in range(200)))
    source = write_jsonl(folder / "s.jsonl", [FORMATS["parts"]])
    options = {"text": str(folder / "words.txt"), "samples": 1, "seqlen": 8, "images": source, "curvature": True}
    statistics = calibrate(families.FAMILIES["llava"](), folder / "out", processor=llava_processor(PARTS), **options)
    output = statistics.output("model.language_model.layers.1.mlp.down_proj", "image")
    assert output.labels == 3  # two words and the end
    tower = next(name for name in statistics.manifest.blocks if "vision_tower" in name)
    assert statistics.moment(tower, "image").count == 2 * 17  # patches and the class token


# Templates


@pytest.mark.parametrize("template", [PARTS, PLAIN, BOTH])
@pytest.mark.parametrize("form", ["string", "parts"])
def test_a_template_gets_the_form_that_it_takes(template, form):
    """Parts alone and strings alone would leave out a text in silence, or fail."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    contents = [text if form == "string" else [part(text)] for text in (SYSTEM, ASKED, SAID)]
    written = render(tokenizer, turns(*contents), "line 1")
    assert written == "<s> system w3 user w4 w5 assistant w6"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_SYSTEM, "System role not supported"),
        ("<s>{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "leaves out"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_does_not_take_the_conversation_is_named(template, message):
    processor = llava_processor(template or PARTS)
    processor.chat_template = template
    with pytest.raises(SampleError, match=message) as error:
        render(processor, turns(SYSTEM, ASKED, SAID), "file, line 3")
    assert "file, line 3" in str(error.value)


def load(folder: Path, template: str | None, row: dict):
    source, model = write_jsonl(folder / "s.jsonl", [row]), families.FAMILIES["llava"]()
    more = {"text": None, "samples": 1, "seqlen": 8, "seed": 0, "instruction": "w2", "sees": True}
    return load_data(model, llava_processor(template), images=source, **more)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (NO_SYSTEM, FORMATS["parts"], "System role not supported"),
        (None, FORMATS["parts"], "several turns, for which the processor LlavaProcessor has no chat template"),
        (ONE_IMAGE, {"images": [A, B], "question": ASKED}, "has 2 images, of which the chat template .* writes 1"),
    ],
)
def test_what_a_template_does_not_take_is_known_before_any_pass(folder, template, row, message):
    with pytest.raises(SampleError, match=rf"s\.jsonl, line 1 .*{message}"):
        load(folder, template, row)
    assert load(folder, PARTS, row).samples == {"image": 1}


def test_a_processor_without_template_takes_one_question_about_several_images(folder):
    sample = one(folder, {"images": [A, B], "question": ASKED})
    (batch,) = image_batches([sample], llava_processor(None), 1)
    assert batch.inputs["input_ids"].tolist() == [[1, *[120] * 32, 4, 5]]


# What cannot be used


USER = {"role": "user", "content": ASKED}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "must be a list of turns"),
        ({"messages": "w4"}, "must be a list of turns"),
        ({"messages": ["w4"]}, "must be a list of turns"),
        ({"messages": [{"role": "tool", "content": "w4"}]}, "turn of 'tool'; only those of system, user"),
        ({"messages": [{"content": "w4"}]}, "turn of None"),
        ({"messages": [{"role": ["user"], "content": "w4"}]}, "turn of ..user"),
        ({"messages": [{"role": "user"}]}, "neither a string nor a list"),
        ({"messages": [{"role": "user", "content": {"text": "w4"}}]}, "neither a string nor a list"),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "neither a string nor"),
        ({"messages": [{"role": "user", "content": ["w4"]}]}, "a part of type"),
        ({"messages": [{"role": "user", "content": [None]}]}, "a part of type"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "type 'video'"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "a part of type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, 'string under "text"'),
        ({"messages": [USER], "conversations": [USER]}, 'both "messages" and "conversations"'),
        ({"messages": [USER], "question": "w5"}, "both a conversation and a single question"),
        ({"messages": [USER, {"role": "assistant", "content": "w6"}], "answer": "w7"}, "answer beside that"),
        ({"messages": [{"role": "assistant", "content": "w6"}]}, "no turn of the user"),
        ({"messages": [{"role": "system", "content": "w6"}]}, "no turn of the user"),
        ({"images": [B], "messages": [USER]}, 'both "image" and "images"'),
        ({"messages": [{"role": "user", "content": "<image> <image> w4"}]}, "1 images and 2 places"),
        ({"messages": [{"role": "user", "content": [IMAGE, IMAGE]}]}, "1 images and 2 places"),
        ({"messages": [{"role": "user", "content": [{**IMAGE, "index": 1}]}]}, "count each once, from 0"),
        ({"messages": [{"role": "user", "content": [{**IMAGE, "index": [0]}]}]}, "count each once, from 0"),
        ({"prompt": [USER], "messages": [USER]}, "must be strings"),
        ({"prompt": [USER], "completion": "w6", "answer": "w7"}, 'both "answer" and "completion"'),
        ({"messages": [USER, {"role": "assistant", "content": "<image> w6"}]}, "image in the answer"),
    ],
)
def test_conversations_that_cannot_be_used_name_the_line(folder, row, message):
    source = write_jsonl(folder / "s.jsonl", [{"image": A}, {"image": A, **row}])
    with pytest.raises(SampleError, match=message) as error:
        load_images(source, samples=1, seed=0)
    assert "s.jsonl, line 2" in str(error.value)


def test_a_conversation_without_an_image_is_no_image_sample(folder):
    with pytest.raises(SampleError, match="line 1 shows no image; give it as a text source"):
        one(folder, {"messages": [USER]})


def test_other_keys_are_ignored(folder):
    sample = one(folder, {"image": A, "messages": [{**USER, "name": "x", "weight": 1}], "id": 3, "meta": {"a": [1]}})
    assert read_chat({"text": "w4"}, None, "line 1") is None
    assert sample.turns[0]["role"] == "user"


# Text


def test_conversations_as_text(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = PLAIN
    rows = [
        {"messages": turns(SYSTEM, ASKED, SAID)},
        {"conversations": turns(SYSTEM, AGAIN, LAST, **SHAREGPT)},
        {"text": "w20"},
        {"text": "w21"},
    ]
    source = write_jsonl(tmp_path / "s.jsonl", rows)
    text = load_text(source, processor=tokenizer)
    first, second = " system w3 user w4 w5 assistant w6", " system w3 user w7 assistant w8 w9"
    assert text == f"{first}{second}w20\n\nw21"  # BOS is the window's own affair
    windows = text_windows(text, tokenizer, samples=2, seqlen=4, seed=0)
    assert (windows == 1).sum(1).tolist() == [1, 1]
    with pytest.raises(SampleError, match="line 1 is a conversation, which needs the model's chat template"):
        load_text(source)
    tokenizer.chat_template = None
    with pytest.raises(SampleError, match=r"line 1 is a conversation and .* has no chat template"):
        load_text(source, processor=tokenizer)


def test_text_conversations_of_a_model_that_sees_use_its_processor(tmp_path):
    source = write_jsonl(tmp_path / "s.jsonl", [{"messages": turns(SYSTEM, ASKED, SAID)}] * 3)
    model, processor = families.FAMILIES["llava"](), llava_processor(PARTS)
    more = {"images": None, "samples": 2, "seqlen": 5, "seed": 0, "instruction": "w2", "sees": True}
    data = load_data(model, processor, text=source, **more)
    assert data.windows.shape == (2, 5)
    assert (data.windows[:, 0] == 1).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "w3", "messages": [USER]}, 'both "text" and a conversation'),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": A}]}]}, "shows images; give it as an"),
        ({"messages": 3}, "must be a list of turns"),
        ({"prompt": "w3"}, 'no string "text"'),
    ],
)
def test_text_rows_that_cannot_be_used_name_the_line(tmp_path, row, message):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = PLAIN
    with pytest.raises(SampleError, match=f"line 2 .*{message}|line 2: .*{message}"):
        load_text(write_jsonl(tmp_path / "s.jsonl", [{"text": "w2"}, row]), processor=tokenizer)


def test_conversations_of_a_data_set(monkeypatch, folder):
    files = [folder / A, folder / B]
    row = {"messages": FORMATS["parts"]["messages"], "images": [{"bytes": file.read_bytes()} for file in files]}
    fake_datasets(monkeypatch, [row])
    (sample,) = load_images("org/pictures", samples=1, seed=0)
    assert data_fingerprint(None, [sample], None) == data_fingerprint(None, [one(folder, FORMATS["parts"])], None)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = PLAIN
    fake_datasets(monkeypatch, [{"messages": turns(SYSTEM, ASKED)}])
    assert load_text("org/talk", processor=tokenizer) == " system w3 user w4 w5"
