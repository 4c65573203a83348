"""Samples and settings that cannot be used: one sentence that names the file and line, or the question."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import families
from helpers.evaluated import TEXT, TOKENIZER, backbone, make_llama, make_llava, make_processor, make_questions
from helpers.samples import image_folder, llava_processor, noise, sample, word_tokenizer, write_jsonl
from spectrim.calibrate.data import load_data
from spectrim.errors import ModelError, SampleError, SpectrimError
from spectrim.evaluate import Question, evaluate, load_questions, perplexity, vqa
from spectrim.evaluate.harnesses import run_suite
from spectrim.evaluate.results import EvaluationReport
from spectrim.evaluate.suites import Suite
from spectrim.samples import image_batches, load_images, load_text, media_tokens, text_batches
from spectrim.settings import EvaluationOptions

DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def said(error: pytest.ExceptionInfo[SpectrimError]) -> str:
    """The message, which is one line."""
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (rb'{"text": "\ud800"}', "half of a surrogate pair"),
        (rb'{"\udfff": 1, "text": "a"}', "half of a surrogate pair"),
        (DEEP, "nested too deeply"),
        (b'{"text": "a", "text": "b"}', "gives the key 'text' twice"),
        (b'{"text": "a", "more": {"k": 1, "k": 2}}', "gives the key 'k' twice"),
        (b'{"text": "a\0b"}', "is not JSON"),
        (b'"text"', "is not a JSON object"),
        (b"\xff\xfe{\0}\0", "is not UTF-8"),
    ],
)
def test_lines_of_every_jsonl_are_read_with_the_same_care(tmp_path, line, message):
    noise(0).save(tmp_path / "a.png")
    good = b'{"text": "a", "image": "a.png", "question": "q", "answer": "a"}\n'
    (tmp_path / "s.jsonl").write_bytes(good + line + b"\n")
    source = str(tmp_path / "s.jsonl")
    for read in (
        lambda: load_text(source),
        lambda: load_images(source, samples=1, seed=0),
        lambda: load_questions(source, 1, 0),
    ):
        with pytest.raises(SampleError, match=message) as error:
            read()
        assert f"{source}, line 2" in said(error)


def test_what_is_odd_and_not_wrong_is_read(tmp_path):
    """A byte order mark, blank lines, separators of lines inside a string, an emoji as a pair, a long line."""
    noise(0).save(tmp_path / "a.png")
    row = {"text": "a\u2028b", "image": "a.png", "question": "a\u2028b\x85?", "answer": "\U0001f600"}
    content = json.dumps(row, ensure_ascii=False) + "\n\n" + json.dumps({**row, "text": "x" * 10_000_000}) + "\n"
    (tmp_path / "s.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode())
    source = str(tmp_path / "s.jsonl")
    assert len(load_text(source)) == 10_000_005
    assert len(load_images(source, samples=2, seed=0)) == 2
    assert [q.question for q in load_questions(source, 2, 0)] == ["a\u2028b\x85?"] * 2
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    assert load_text(str(tmp_path / "a.txt")) == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words".encode("utf-16"), "not UTF-8"),
        (b"w\0o\0r\0d\0", "null bytes"),
        ("\ud800".encode("utf-8", "surrogatepass"), "not UTF-8"),
        (b"\xef\xbb\xbf \n", "is empty"),
    ],
)
def test_text_files_of_another_kind_are_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SampleError, match=message) as error:
        load_text(str(tmp_path / "a.txt"))
    assert "a.txt" in said(error)


def test_empty_sources_are_named(tmp_path):
    (tmp_path / "s.jsonl").write_text("\n\n")
    (tmp_path / "none").mkdir()
    with pytest.raises(SampleError, match=r"s\.jsonl' is empty"):
        load_text(str(tmp_path / "s.jsonl"))
    with pytest.raises(SampleError, match=r"s\.jsonl holds no question"):
        load_questions(str(tmp_path / "s.jsonl"), 1, 0)
    for source in (tmp_path / "s.jsonl", tmp_path / "none"):
        with pytest.raises(SampleError, match="has 0 images and 1 were asked for"):
            load_images(str(source), samples=1, seed=0)


def test_text_in_place_of_a_source_is_named():
    with pytest.raises(SampleError, match="cannot be opened") as error:
        load_text("word " * 100)
    said(error)
    with pytest.raises(SampleError, match="no source of questions"):
        load_questions("word " * 100, 1, 0)
    with pytest.raises(SampleError, match="half a character"):
        load_images("builtin", samples=1, seed=0, instruction="w\udcff")


# Tokens that stand for images


def test_tokens_that_stand_for_media_are_those_of_processor_and_model():
    processor, model = llava_processor(), families.FAMILIES["llava"]()
    assert media_tokens(processor) == ("<image>",)
    assert media_tokens(word_tokenizer()) == ("<image>",)
    model.config.image_token_id = 7
    assert media_tokens(processor, model.config) == ("<image>", "w7")


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.txt", "w3\nw4\nw5 <image> w6\n", "line 3"),
        ("a.jsonl", '{"text": "w3"}\n\n{"text": "w5 <image>"}\n', "line 3"),
        ("a.jsonl", '{"text": "w3"}\n{"messages": [{"role": "user", "content": "w5 <image>"}]}\n', "line 2"),
    ],
)
def test_an_image_token_in_plain_text_is_named(tmp_path, name, content, where):
    """In calibration, with the tokenizer alone too, and in evaluation."""
    (tmp_path / name).write_text(content)
    model, more = families.FAMILIES["llava"](), {"images": None, "samples": 1, "seqlen": 4, "seed": 0}
    for processor in (llava_processor(), word_tokenizer()):
        processor.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        with pytest.raises(SampleError, match="holds '<image>' as text") as error:
            load_data(model, processor, text=str(tmp_path / name), instruction="w2", sees=True, **more)
        assert f"{name}, {where}" in said(error)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "w4 <image>"},
        {"instruction": "<image>"},
        {"question": "w4", "answer": "w5 <image>"},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w4 <image>"}]}]},
    ],
)
def test_an_image_token_in_an_image_sample_names_the_line(tmp_path, row):
    image_folder(tmp_path / "p", 1)
    source = write_jsonl(tmp_path / "s.jsonl", [{"image": "p/000.png", **row}])
    more = {"text": None, "samples": 1, "seqlen": 4, "seed": 0, "instruction": "w2", "sees": True}
    with pytest.raises(SampleError, match="holds '<image>' as text") as error:
        load_data(families.FAMILIES["llava"](), llava_processor(), images=source, **more)
    assert "s.jsonl, line 1" in said(error)
    more["instruction"] = "<image> w2"
    with pytest.raises(SampleError, match="holds '<image>' as text"):
        load_data(families.FAMILIES["llava"](), llava_processor(), images=str(tmp_path / "p"), **more)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    make_llava().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def test_an_image_token_in_a_question_is_named(seeing, tmp_path):
    odd = Question("colour", noise(0), "Is <image> red?", "one")
    with pytest.raises(SampleError, match="the question 'Is <image> red\\?' holds '<image>' as text") as error:
        vqa(make_llava(), make_processor(), [*make_questions(), odd])
    said(error)
    noise(0).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Is <image> red?", "answer": "one"}
    source = write_jsonl(tmp_path / "q.jsonl", [row])
    with pytest.raises(SampleError, match="the question 'Is <image> red\\?' holds '<image>' as text"):
        evaluate([seeing], tasks=["vqa"], questions=source, blind=False)
    (tmp_path / "t.txt").write_text(TEXT + "\n<image>")
    with pytest.raises(SampleError, match=r"t\.txt, line 2 holds '<image>' as text"):
        evaluate([seeing], tasks=["perplexity"], text=str(tmp_path / "t.txt"), seqlen=32)
    with pytest.raises(SampleError, match="text for perplexity holds '<image>'"):
        perplexity(make_llava(), make_processor().tokenizer, TEXT + " <image>", seqlen=32)


# What a processor or a model does not take


def test_a_sample_that_the_processor_refuses_is_named():
    """In a batch, too: the one and not its neighbours."""

    class Strict(type(llava_processor())):
        def __call__(self, images=None, **options):
            if any(image.width == 1 for shown in images for image in shown):
                raise ValueError("too narrow\nand more")
            return super().__call__(images=images, **options)

    plain = llava_processor()
    processor = Strict(plain.image_processor, plain.tokenizer, 4, "default", num_additional_image_tokens=1)
    narrow = sample(0, "w3")
    narrow = type(narrow)((Image.new("RGB", (1, 9)),), narrow.turns, None, "s.jsonl, line 7")
    with pytest.raises(SampleError, match=r"s\.jsonl, line 7 cannot be read by Strict \(too narrow; images of 1×9 pix"):
        list(image_batches([sample(1, "w3"), narrow], processor, 1))
    made = make_processor()
    strict = Strict(made.image_processor, made.tokenizer, 14, "default", num_additional_image_tokens=1)
    asked = [
        *make_questions()[:2],
        Question(
            "colour", Image.new("RGB", (1, 9)), "How narrow is this picture, which comes last by its length?", "one"
        ),
    ]
    with pytest.raises(
        SampleError, match=r"the question 'How narrow is this .*' of task 'colour' cannot be read by Strict"
    ):
        vqa(make_llava(), strict, asked)


def test_the_smallest_images_are_read():
    for width, height in ((1, 1), (1, 3), (3, 1), (3, 40)):
        grey = Image.new("RGB", (width, height), (9, 99, 199))
        small = type(sample(0, "w3"))((grey,), sample(0, "w3").turns)
        (batch,) = image_batches([small], llava_processor(), 1)
        pixels = batch.inputs["pixel_values"][0]
        assert (pixels == pixels[:, :1, :1]).all()
        assert pixels[0, 0, 0] < pixels[1, 0, 0] < pixels[2, 0, 0]


def small_vocabulary(rows: int) -> PreTrainedModel:
    config = backbone()
    config.vocab_size = rows
    return type(make_llama())(config)


def test_a_model_with_fewer_tokens_than_its_tokenizer_is_named(tmp_path, seeing):
    with pytest.raises(SampleError, match=r"tokenizer gives token \d+ and the model knows 200; use the model's own"):
        perplexity(small_vocabulary(200), TOKENIZER, TEXT, seqlen=32)
    small_vocabulary(200).save_pretrained(tmp_path / "small")
    TOKENIZER.save_pretrained(tmp_path / "small")
    (tmp_path / "t.txt").write_text(TEXT)
    with pytest.raises(SampleError, match=r"small: the tokenizer gives token \d+ and the model knows 200"):
        evaluate([seeing, tmp_path / "small"], tasks=["perplexity"], text=str(tmp_path / "t.txt"), seqlen=32)
    model = make_llava()
    model.config.text_config.vocab_size = 50
    with pytest.raises(SampleError, match="the model knows 50"):
        vqa(model, make_processor(), make_questions())
    image_folder(tmp_path / "p", 1)
    more = {"text": None, "samples": 1, "seqlen": 4, "seed": 0, "instruction": "w110", "sees": True}
    model = families.FAMILIES["llava"]()
    model.config.text_config.vocab_size = 100
    with pytest.raises(SampleError, match="token 110 and the model knows 100"):
        load_data(model, llava_processor(None), images=str(tmp_path / "p"), **more)


def no_language_model(kind: str) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    if kind == "vision":
        return ViTModel(ViTConfig(**sizes, image_size=28, patch_size=14))
    if kind == "no head":
        return LlamaModel(backbone())
    if kind == "both directions":
        return BertLMHeadModel(BertConfig(vocab_size=300, is_decoder=False, initializer_range=0.3, **sizes))
    return T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("vision", "ViTModel reads no tokens and is no language model"),
        ("no head", "LlamaModel predicts no tokens and is no language model"),
        ("both directions", "BertLMHeadModel attend to later ones"),
        ("encoder and decoder", "a t5 has a decoder that reads an encoder"),
    ],
)
def test_perplexity_wants_a_causal_language_model(kind, message):
    with pytest.raises(ModelError, match=message) as error:
        perplexity(no_language_model(kind).eval(), TOKENIZER, TEXT, seqlen=32)
    said(error)


def test_answers_want_a_model_that_generates():
    with pytest.raises(ModelError, match="LlamaModel cannot generate answers"):
        vqa(LlamaModel(backbone()), make_processor(), make_questions())


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"samples": -3}, "samples must be at least 1, not -3"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"seqlen": 0}, "seqlen must be at least 1, not 0"),
        ({"stride": 0}, "stride must be at least 1, not 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"seqlen": 16, "stride": 17}, "stride is 17 and seqlen is 16"),
        ({"seqlen": 512}, "512 tokens exceed the model's 256 positions"),
        ({"seqlen": "many"}, "seqlen cannot be 'many'"),
    ],
)
def test_settings_that_cannot_be_are_named_before_anything_loads(seeing, settings, message):
    with pytest.raises(SampleError, match=message) as error:
        evaluate([seeing], **{"seqlen": 64, **settings})
    said(error)


def test_numbers_below_one_are_refused_by_every_function():
    text, llama = TEXT[:90], make_llama()
    calls = [
        ("batch_size", lambda: perplexity(llama, TOKENIZER, text, batch_size=0)),
        ("seqlen", lambda: perplexity(llama, TOKENIZER, text, seqlen=0)),
        ("stride", lambda: perplexity(llama, TOKENIZER, text, seqlen=8, stride=0)),
        ("stride", lambda: perplexity(llama, TOKENIZER, text, seqlen=8, stride=9)),
        ("max_tokens", lambda: perplexity(llama, TOKENIZER, text, seqlen=8, max_tokens=0)),
        ("batch_size", lambda: vqa(make_llava(), make_processor(), make_questions(), batch_size=0)),
        ("max_new_tokens", lambda: vqa(make_llava(), make_processor(), make_questions(), max_new_tokens=0)),
        ("batch_size", lambda: list(text_batches(torch.zeros(2, 3, dtype=torch.int64), 0))),
        ("batch_size", lambda: list(image_batches([sample(0, "w3")], llava_processor(), -1))),
        ("samples", lambda: load_images("builtin", samples=0, seed=0)),
        ("samples", lambda: load_questions("builtin", 0, 0)),
        ("seed", lambda: load_questions("builtin", 1, -1)),
        ("seed", lambda: load_images("builtin", samples=1, seed=-1)),
    ]
    for name, call in calls:
        with pytest.raises(SampleError, match=name) as error:
            call()
        said(error)


@pytest.mark.parametrize("settings", [{"limit": 0}, {"batch_size": 0}, {"limit": -1}])
def test_settings_of_a_suite_are_checked(seeing, settings):
    pytest.importorskip("lm_eval")
    with pytest.raises(SampleError, match="must be at least 1"):
        run_suite(Suite(name="local", harness="lm-eval", tasks=("piqa",)), [seeing], **settings)


def test_the_record_of_settings_has_the_defaults():
    chosen = EvaluationOptions()
    assert (chosen.tasks, chosen.text, chosen.questions) == (("perplexity", "vqa"), "builtin", "builtin")
    assert EvaluationOptions.checked(seqlen=64).scored.stride == 64
    assert EvaluationOptions.checked(seqlen=64, stride=3).scored.stride == 3


# Files that spectrim wrote, and suites


@pytest.mark.parametrize(
    ("read", "name", "content", "message"),
    [
        (EvaluationReport.read, "r.json", b"{" * 100_000, "no evaluation report"),
        (EvaluationReport.read, "r.json", b'{"a":' * 100_000, "no evaluation report"),
        (EvaluationReport.read, "r.json", b'{"schema": 1, "schema": 1}', "gives the key 'schema' twice"),
        (EvaluationReport.read, "r.json", b"\xff", "is not UTF-8"),
        (EvaluationReport.read, "r.json", b"[]", "no evaluation report"),
        (Suite.read, "s.yaml", b"name: a\nname: b\nharness: lm-eval\ntasks: [c]\n", "gives the key 'name' twice"),
        (Suite.read, "s.yaml", b"a: " + b"[" * 100_000, "nested too deeply"),
        (Suite.read, "s.yaml", b"\xff", "is not YAML"),
        (Suite.read, "s.yaml", b"a: !!python/object:os.system {}", "is not YAML"),
        (Suite.read, "s.yaml", b"3", "suite"),
    ],
)
def test_damaged_reports_and_suites_are_named(tmp_path, read, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SampleError, match=message) as error:
        read(tmp_path / name)
    assert name in said(error)
