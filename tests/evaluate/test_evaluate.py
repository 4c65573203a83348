"""Evaluation against independent computations: one token at a time, one question at a time, exact enumeration."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import (
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from helpers.evaluated import TEXT, TOKENIZER, make_llama, make_llava, make_processor, make_questions, make_tokenizer
from spectrim.checkpoint import save
from spectrim.errors import CheckpointError, NumericalError, SampleError
from spectrim.evaluate import (
    EvaluationReport,
    Question,
    evaluate,
    normalise,
    paired_difference,
    perplexity,
    plan_windows,
    table,
    vqa,
)
from spectrim.evaluate.questions import blind_questions
from spectrim.storage.layers import replace_linears


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="module")
def llava() -> LlavaForConditionalGeneration:
    return make_llava()


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return make_processor()


# Perplexity


def test_one_window_equals_the_whole_sequence(llama: LlamaForCausalLM) -> None:
    tokenizer = TOKENIZER
    ids = torch.tensor([[0, *tokenizer(TEXT)["input_ids"]]])[:, :200]
    text = tokenizer.decode(ids[0, 1:])
    with torch.no_grad():
        scores = llama(input_ids=ids).logits.log_softmax(-1)
    loss = -scores[0, torch.arange(199), ids[0, 1:]].mean().item()
    result = perplexity(llama, tokenizer, text, seqlen=256)
    assert result.tokens == 199
    assert result.bytes == len(text.encode())
    assert result.nll == pytest.approx(199 * loss, rel=1e-10)
    assert result.per_token == pytest.approx(math.exp(loss), rel=1e-10)
    assert result.per_byte == pytest.approx(math.exp(199 * loss / len(text.encode())), rel=1e-10)
    assert result.seconds > 0


@pytest.mark.parametrize(("seqlen", "stride"), [(16, 16), (16, 5), (16, 1), (1, 1), (24, 23)])
@pytest.mark.parametrize("bos", ["none", "text", "prompts"])
def test_strided_windows_equal_one_token_at_a_time(llama: LlamaForCausalLM, bos: str, seqlen: int, stride: int) -> None:
    tokenizer = make_tokenizer(bos=bos != "none", in_prompts=bos == "prompts")
    text = TEXT[:90]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = ids if bos == "none" else [0, *ids]
    nll = 0.0
    with torch.no_grad():
        for target in range(1, len(stream)):
            moves = max(0, math.ceil((target - seqlen) / stride))
            end = min(len(stream) - 1, seqlen + moves * stride)
            context = stream[max(0, end - seqlen) : target]
            if bos == "prompts":
                context = [0, *context[1:]]
            logits = llama(input_ids=torch.tensor([context])).logits[0, -1]
            nll += (logits.logsumexp(0) - logits[stream[target]]).item()
    result = perplexity(llama, tokenizer, text, seqlen=seqlen, stride=stride)
    assert result.nll == pytest.approx(nll, rel=1e-10)
    assert result.tokens == len(stream) - 1
    skipped = len(tokenizer.decode(ids[:1]).encode()) if bos == "none" else 0
    assert result.bytes == len(text.encode()) - skipped


def test_perplexity_does_not_depend_on_the_batch_size(llama: LlamaForCausalLM) -> None:
    results = [perplexity(llama, TOKENIZER, TEXT, seqlen=32, stride=20, batch_size=size) for size in (1, 3, 100)]
    assert {r.tokens for r in results} == {results[0].tokens}
    assert [r.nll for r in results] == pytest.approx([results[0].nll] * 3, rel=1e-10)


@given(st.text(min_size=1, max_size=40), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_a_cut_text_is_scored_up_to_a_whole_character(llama: LlamaForCausalLM, text: str, max_tokens: int) -> None:
    tokenizer = TOKENIZER
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = [n for n in range(1, min(len(ids), max_tokens) + 1) if text.startswith(tokenizer.decode(ids[:n]))]
    if not whole:
        with pytest.raises(SampleError, match=f"0 of the text's {len(ids)} tokens"):
            perplexity(llama, tokenizer, text, seqlen=64, max_tokens=max_tokens)
        return
    result = perplexity(llama, tokenizer, text, seqlen=64, max_tokens=max_tokens)
    prefix = perplexity(llama, tokenizer, tokenizer.decode(ids[: whole[-1]]), seqlen=64)
    assert (result.tokens, result.bytes) == (whole[-1], len(tokenizer.decode(ids[: whole[-1]]).encode()))
    assert result.nll == pytest.approx(prefix.nll, rel=1e-9)


def test_perplexity_keeps_the_models_mode_and_reports_progress(llama: LlamaForCausalLM) -> None:
    seen: list[tuple[int, int]] = []
    llama.train()
    perplexity(llama, TOKENIZER, TEXT, seqlen=64, batch_size=2, progress=lambda *step: seen.append(step))
    assert llama.training
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1] == len(plan_windows(len(TOKENIZER(TEXT)["input_ids"]), 64, 64))
    llama.eval()


def test_non_finite_logits_name_the_window() -> None:
    model, tokenizer = make_llama(), TOKENIZER
    ids = tokenizer("colour " * 30 + "Z" + " shape" * 10)["input_ids"]
    rare = tokenizer("Z")["input_ids"][0]
    assert ids.count(rare) == 1
    model.get_input_embeddings().weight.data[rare] = math.nan
    window = (ids.index(rare) + 1) // 8  # stream position of the rare token, windows of 8 inputs without overlap
    with pytest.raises(NumericalError, match=f"window {window} "):
        perplexity(model, tokenizer, tokenizer.decode(ids), seqlen=8, batch_size=3)


def test_perplexity_refuses_what_it_cannot_score(llama: LlamaForCausalLM) -> None:
    with pytest.raises(SampleError, match="0 of the text"):
        perplexity(llama, TOKENIZER, "")
    with pytest.raises(SampleError, match="0 of the text"):
        perplexity(llama, make_tokenizer(bos=False), "a")
    with pytest.raises(SampleError, match="256 positions"):
        perplexity(llama, TOKENIZER, TEXT * 3, seqlen=512)


# Visual question answering


def one_at_a_time(model: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: Question) -> str:
    """Greedy answer by whole forward passes: no batch, no padding, no cache, no generate()."""
    prompt = f"<s>{'<image>' * 4}{asked.question} => "
    ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    pixels = processor.image_processor([asked.image], return_tensors="pt")["pixel_values"]
    new: list[int] = []
    with torch.no_grad():
        while len(new) < 8 and 1 not in new:
            logits = model(input_ids=torch.tensor([ids + new]), pixel_values=pixels).logits
            new.append(int(logits[0, -1].argmax()))
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_batched_answers_equal_one_question_at_a_time(
    llava: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    questions = make_questions()
    expected = [one_at_a_time(llava, processor, q) for q in questions]
    assert len(set(expected)) > 4  # the model looks at the image
    for batch_size in (1, 5, 64):
        answers = vqa(llava, processor, questions, batch_size=batch_size)
        assert [a.given for a in answers] == expected
        assert [(a.task, a.question, a.expected) for a in answers] == [
            (q.task, q.question, q.answer) for q in questions
        ]
    swapped = vqa(llava, processor, questions, blind=True)
    assert [a.given for a in swapped] == [one_at_a_time(llava, processor, q) for q in blind_questions(questions)]
    assert processor.tokenizer.pad_token is None  # lent for padding only


def test_sampling_settings_of_the_checkpoint_do_not_apply(processor: LlavaProcessor) -> None:
    plain, noisy = make_llava(), make_llava()
    noisy.generation_config.update(
        do_sample=True, temperature=3.0, top_p=0.5, repetition_penalty=9.0, no_repeat_ngram_size=1
    )
    assert vqa(noisy, processor, make_questions()) == vqa(plain, processor, make_questions())


def test_non_finite_logits_name_the_question(processor: LlavaProcessor) -> None:
    model, questions = make_llava(), make_questions()
    odd = Question("colour", questions[0].image, "Which ZZ is it?", "one")
    model.get_input_embeddings().weight.data[processor.tokenizer("Z", add_special_tokens=False)["input_ids"]] = math.nan
    with pytest.raises(NumericalError, match="'Which ZZ is it\\?' are not finite at generated token 0"):
        vqa(model, processor, [*questions, odd])
    with pytest.raises(SampleError, match="no images"):
        vqa(model, processor.tokenizer, questions)
    with pytest.raises(SampleError, match="no question"):
        vqa(model, processor, [])


# Directories


def write_questions(folder: Path, questions: list[Question], answers: list[str]) -> Path:
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for number, (q, answer) in enumerate(zip(questions, answers, strict=True)):
        q.image.save(folder / "pictures" / f"{number}.png")
        record = {"image": f"pictures/{number}.png", "question": q.question, "answer": answer, "task": q.task}
        lines.append(json.dumps(record))
    (folder / "suite.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder / "suite.jsonl"


RETENTION = {"params": 1.5, "bytes": 1.5}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, processor: LlavaProcessor) -> list[Path]:
    """A compressed directory (seed 1, two linears as exact products of factors) and a dense one (seed 0)."""
    root = tmp_path_factory.mktemp("models")
    model = make_llava(1)
    weights = {f"model.language_model.layers.{i}.mlp.up_proj": 32 for i in (0, 1)}
    dense = {name: model.get_submodule(name).weight.detach().double() for name in weights}
    replace_linears(model, weights)
    for name, weight in dense.items():
        U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
        layer = model.get_submodule(name)
        layer.A.weight.data.copy_(U * s)
        layer.B.weight.data.copy_(Vh)
    save(model, root / "small", processor=processor, provenance={"retention": RETENTION})
    make_llava(0).save_pretrained(root / "dense")
    processor.save_pretrained(root / "dense")
    return [root / "small", root / "dense"]


def test_evaluate_end_to_end(directories: list[Path], processor: LlavaProcessor, tmp_path: Path) -> None:
    questions = sorted(make_questions(), key=lambda q: q.task)
    said = [[one_at_a_time(make_llava(seed), processor, q) for q in questions] for seed in (0, 1)]
    # Right answers such that the first model knows all but every fourth, and the second only those it shares.
    truth = ["unknown" if i % 4 == 3 else answer for i, answer in enumerate(said[0])]
    source = str(write_questions(tmp_path, questions, [answer or "nothing" for answer in truth]))
    (tmp_path / "text.txt").write_text(TEXT)
    stages: list[str] = []
    report = evaluate(
        directories,
        text=str(tmp_path / "text.txt"),
        questions=source,
        seqlen=64,
        device="cpu",
        progress=lambda what, done, total: stages.append(what),
    )
    whats = ["small: perplexity", "small: vqa", "dense: perplexity", "dense: vqa", "dense: vqa with swapped images"]
    assert stages == whats
    marks = [[normalise(a) == normalise(t) for a, t in zip(row, truth, strict=True)] for row in said]
    small, dense = report.results
    assert report.reference == dense.directory == str(directories[1])
    assert (small.compressed, dense.compressed) == (True, False)
    assert dense.differences == ()
    for result, row, seed in zip((dense, small), marks, (0, 1), strict=True):
        assert result.vqa is not None
        assert [a.correct for a in result.answers] == row
        assert [(t.task, t.correct) for t in result.vqa.tasks] == [("colour", sum(row[:8])), ("count", sum(row[8:]))]
        assert result.vqa.mean == pytest.approx(sum(row) / 16)
        assert result.vqa.questions_per_second > 0
        direct = perplexity(make_llava(seed), processor.tokenizer, TEXT, seqlen=64)
        assert result.perplexity is not None
        assert result.perplexity.nll == pytest.approx(direct.nll, rel=1e-5)
        assert result.bytes == (Path(result.directory) / "model.safetensors").stat().st_size
    rows = {row.task: row.difference for row in small.differences}
    assert rows["colour"] == paired_difference(marks[1][:8], marks[0][:8])
    assert rows[None] == paired_difference(marks[1], marks[0])
    assert (small.retention, dense.retention) == (RETENTION, None)
    swapped = [one_at_a_time(make_llava(0), processor, q) for q in blind_questions(questions)]
    assert report.blind is not None
    assert report.blind.mean == sum(normalise(a) == normalise(t) for a, t in zip(swapped, truth, strict=True)) / 16

    report.write(tmp_path / "out" / "results.json")
    back = EvaluationReport.read(tmp_path / "out" / "results.json")
    assert back.to_json() == report.to_json()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results.json"]
    with (tmp_path / "table.txt").open("w") as file:
        Console(width=200, file=file).print(table(report))
    shown = [line.split() for line in (tmp_path / "table.txt").read_text().splitlines()]
    heads = ("dense", "small", "blind")
    assert [line[0] for line in shown if line and line[0] in heads] == list(heads)
    cells = next(line for line in shown if line and line[0] == "small")
    assert cells[1:4] == [f"{100 * x:.1f}" for x in (sum(marks[1][:8]) / 8, sum(marks[1][8:]) / 8, sum(marks[1]) / 16)]
    assert cells[4] == f"{100 * rows[None].mean:+.1f}"
    assert cells[6] == f"{small.perplexity.per_token:.2f}"
    below = shown[shown.index(cells) + 1]
    assert below[:2] == [f"[{100 * rows[None].low:+.1f},", f"{100 * rows[None].high:+.1f}]"]
    assert below[2] == f"{small.perplexity.per_token - dense.perplexity.per_token:+.2f}"
    assert below[3] == f"{small.bytes / dense.bytes:.1%}"


def test_text_only_model(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "text")
    make_tokenizer(in_prompts=True).save_pretrained(tmp_path / "text")
    with pytest.raises(SampleError, match="text-only"):
        evaluate([tmp_path / "text"], samples=1)
    (tmp_path / "text.txt").write_text(TEXT)
    report = evaluate([tmp_path / "text"], tasks=["perplexity"], text=str(tmp_path / "text.txt"), seqlen=32)
    assert report.results[0].vqa is None
    assert report.blind is None
    assert report.results[0].dtype == "float64"
    assert report.results[0].perplexity.nll == pytest.approx(
        perplexity(make_llama(), make_tokenizer(in_prompts=True), TEXT, seqlen=32).nll
    )
    assert len(table(report).rows) == 1


def test_evaluate_refuses_bad_input_before_it_loads(directories: list[Path], tmp_path: Path) -> None:
    for tasks, message in ((["speed"], "'speed'"), ([], "no evaluation task"), (["vqa", "vqa"], "named twice")):
        with pytest.raises(SampleError, match=message):
            evaluate(directories, tasks=tasks)
    for paths, message in (([tmp_path], r"config\.json"), ([directories[0]] * 2, "twice"), ([], "at least one")):
        with pytest.raises(CheckpointError, match=message):
            evaluate(paths)
    (tmp_path / "results.json").write_text("{}")
    shared = write_questions(tmp_path, [q for q in make_questions() if q.task == "count"][:1] * 2, ["one"] * 2)
    with pytest.raises(SampleError, match="share one image"):
        evaluate(directories, questions=str(shared), seqlen=64)
    with pytest.raises(SampleError, match="no evaluation report"):
        EvaluationReport.read(tmp_path / "results.json")
