"""Answers side by side, without a browser: tokens, times, costs, and where they part."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressed import factored
from families import FAMILIES
from helpers.command import run
from helpers.samples import llava_processor, noise, word_tokenizer
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.demo.tasks import questions
from spectrim.errors import SampleError, UsageError
from spectrim.evaluate.answering import vqa
from spectrim.evaluate.footprint import stored_bytes
from spectrim.pipeline import compress
from spectrim.ui import page as page_module
from spectrim.ui.answers import Answer, Speaker, in_turn, open_speakers, parting
from spectrim.ui.columns import columns, size


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ui") / "small"
    compress("demo", out, retain=0.1, recipe="svd")
    return out


@pytest.fixture(scope="module")
def speakers(small: Path) -> list[Speaker]:
    sources = [resolve("demo"), str(small)]
    return open_speakers(sources, ["demo", "small"], trust_remote_code=False)


@pytest.fixture(scope="module")
def asked():
    from spectrim.demo.tasks import TASKS

    return [questions(task, "test", 1, 0)[0] for task in TASKS]


def last(streamed) -> list[Answer]:
    *_, answers = streamed
    return answers


def test_answers_are_those_of_evaluate(speakers, asked):
    for speaker in speakers:
        expected = [answer.given for answer in vqa(speaker.model, speaker.processor, asked[:4], max_new_tokens=8)]
        given = [last(in_turn([speaker], q.question, q.image, 8))[0] for q in asked[:4]]
        assert [speaker.read(answer.tokens).strip() for answer in given] == expected
        assert all(answer.done and answer.failed is None for answer in given)
        assert all(list(answer.times) == sorted(answer.times) for answer in given)


def test_models_take_turns_and_nothing_works_unasked(speakers, asked):
    calls = []
    handles = [
        speaker.model.register_forward_hook(lambda *_, name=speaker.name: calls.append(name)) for speaker in speakers
    ]
    stream = in_turn(speakers, "Describe the picture.", asked[0].image, 6)
    first = next(stream)
    assert [len(answer.tokens) for answer in first] == [1, 1]
    assert calls == ["demo", "small"]
    second = next(stream)
    assert [len(answer.tokens) for answer in second] == [2, 2]
    assert calls == ["demo", "small"] * 2
    stream.close()  # as a browser that goes away does
    for handle in handles:
        handle.remove()
    assert calls == ["demo", "small"] * 2


def test_costs_are_those_of_the_files_and_of_memory(speakers, small):
    dense, compressed = speakers
    assert compressed.stored == stored_bytes(small) == (small / "model.safetensors").stat().st_size
    tensors = {t.data_ptr(): t.nbytes for t in [*dense.model.parameters(), *dense.model.buffers()]}
    assert dense.weights == sum(tensors.values())
    assert compressed.weights < dense.weights
    shown = columns(speakers, None)
    assert "no question yet" in shown[0]
    assert size(compressed.stored, dense.stored) in shown[1]


def test_a_question_without_an_image_and_a_bad_one(speakers):
    dense, small = speakers
    (answer,) = last(in_turn([dense], "What is a cat?", None, 4))
    assert answer.done
    assert answer.failed is None
    assert len(answer.tokens) >= 1
    answers = last(in_turn(speakers, "What is <image>?", None, 4))
    assert all("holds '<image>' as text" in answer.failed for answer in answers)
    assert "holds &#x27;&lt;image&gt;&#x27; as text" in columns(speakers, answers)[1]
    assert "no question; write one" in last(in_turn([small], " \n", None, 4))[0].failed


def test_a_model_of_text_alone_answers_and_takes_no_image():
    tokenizer = word_tokenizer()
    speaker = Speaker("none", "text", FAMILIES["llama"](), tokenizer)
    assert (speaker.sees, speaker.stored) == (False, None)
    (answer,) = last(in_turn([speaker], "w7 w8", None, 5))
    ids = tokenizer("w7 w8", return_tensors="pt")["input_ids"]
    expected = speaker.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert list(answer.tokens) == expected.tolist()
    with pytest.raises(SampleError, match="text reads text alone; ask without an image"):
        speaker.prepare("w7", noise(0))
    tokenizer.chat_template = "<s>{% for m in messages %} w3 {{ m.content }} w4{% endfor %}"
    assert speaker.prepare("w7", None)["input_ids"].tolist() == [[1, 3, 7, 4]]  # begun once
    assert "not known" in columns([speaker], None)[0]


def test_the_first_difference_is_marked():
    one, other = (
        Speaker("none", name, model, llava_processor())
        for name, model in (("a", FAMILIES["llava"]()), ("b", factored("llava")))
    )
    same = Answer((5, 6, 7), (0.5, 1.0, 1.5), done=True)
    differs = Answer((5, 9, 7), (0.2, 0.3, 0.4), done=True)
    first, second = columns([one, other], [same, differs])
    assert "w5 <mark>w6</mark> w7" in first.replace("<mark> ", " <mark>")
    assert "w5 <mark>w9</mark> w7" in second.replace("<mark> ", " <mark>")
    assert "at token 2" in second
    assert all(words in first for words in ("2.0 tokens/s", "after 0.50 s"))
    assert "10.0 tokens/s" in second
    assert "<mark>" not in "".join(columns([one, other], [same, same]))
    assert "the same answer" in columns([one, other], [same, same])[1]
    assert "none so far" in columns([one, other], [same, Answer((5,), (0.2,))])[1]
    assert "w6 &lt;" not in first
    third = Speaker("none", "c", FAMILIES["llama"](), word_tokenizer(30))
    assert "has other tokens; not compared" in columns([one, third], [same, differs])[1]


tokens = st.lists(st.integers(0, 2), max_size=6).map(tuple)


@given(tokens, tokens, st.booleans(), st.booleans())
def test_parting_is_the_length_of_the_common_beginning(a, b, a_done, b_done):
    first, other = Answer(a, done=a_done), Answer(b, done=b_done)
    place = parting(first, other)
    assert place == parting(other, first)
    common = next(n for n in range(min(len(a), len(b)), -1, -1) if a[:n] == b[:n])
    if common < min(len(a), len(b)):
        assert place == common
    else:  # one begins the other: they part where the shorter has ended
        ended = (a_done if len(a) < len(b) else b_done) and len(a) != len(b)
        assert place == (common if ended else None)


def test_sizes_for_people():
    assert [size(n) for n in (12, 3400, 13_200_000, 16_584_333_312)] == ["12 bytes", "3.4 kB", "13.2 MB", "16.58 GB"]
    assert size(30, 100) == "30 bytes (30%)"
    assert size(None, 100) == "not known"


def test_without_gradio_it_is_said_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("spectrim.ui.answers.load", None)
    monkeypatch.setattr(page_module, "find_spec", lambda name: None)
    code, out, err = run(capsys, "chat", "demo")
    assert (code, out) == (2, "")
    assert err == "spectrim: spectrim chat needs the package gradio, which is not installed: pip install 'spectrim[ui]'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port 0 is no port"),
        (["--port", "99999"], "--port 99999 is no port"),
        (["--host", "203.0.113.7"], "nothing can listen at 203.0.113.7"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 is too small"),
        (["--device", "foo"], "no kind of device 'foo'"),
        (["demo"], "a model is named twice"),
        (["./nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_said_before_a_model_is_loaded(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("spectrim.ui.answers.load", None)
    monkeypatch.setattr(page_module, "find_spec", lambda name: object())
    code, _, err = run(capsys, "chat", "demo", *arguments)
    assert code == 2
    assert message in err


def test_a_taken_port_is_said(monkeypatch):
    import socket

    monkeypatch.setattr(page_module, "find_spec", lambda name: object())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UsageError, match=f"nothing can listen at 127.0.0.1:{port}"):
            page_module.check_page("127.0.0.1", port)


def test_a_defect_is_no_answer(speakers, asked):
    model = load(resolve("demo"))

    def fail(*_):
        raise IndexError("out of range")

    model.register_forward_hook(fail)
    broken = Speaker("none", "broken", model, load_processor(resolve("demo")))
    with pytest.raises(IndexError):
        last(in_turn([broken], asked[0].question, asked[0].image, 4))
