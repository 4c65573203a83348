"""The page: what it shows of which files, in a real browser, and what it refuses."""

import json
import math
import re
import sys
from dataclasses import replace

import pytest

import spectrim
from families import FAMILIES
from helpers.browser import CHROMIUM, opened
from helpers.command import run
from helpers.evaluated import make_llava, make_processor, make_questions
from helpers.samples import word_tokenizer
from spectrim.bench import Attempt, Frontier
from spectrim.bench.frontier import beside_dense
from spectrim.checkpoint import save
from spectrim.errors import BudgetError, CheckpointError, ReportError, SampleError, UsageError
from spectrim.evaluate import EvaluationReport
from spectrim.evaluate.answering import Answer
from spectrim.evaluate.examples import MOST, chosen
from spectrim.report import report
from spectrim.report.layout import layout
from spectrim.report.reading import read
from spectrim.report.writing import write_page

HARMFUL = '<script>alert("x")</script>&</title>'
SMALL = {"samples": 4, "seqlen": 64, "max_tokens": 256, "kl_tokens": 32}


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    """A folder of `spectrim pareto` with a tiny model: where it is, what was returned, and how it was called."""
    home = tmp_path_factory.mktemp("front")
    save(make_llava(), home / "dense", processor=make_processor())
    processor = spectrim.load_processor(home / "dense")
    samples = {"samples": 4, "seqlen": 32, "batch_size": 4, "answer_tokens": 4}
    spectrim.calibrate(spectrim.load(home / "dense"), home / "stats", processor=processor, **samples)
    how = {"stats": home / "stats", "sizes": ["1kB", "40%"], "recipes": ["svd", "laser"]}
    found = spectrim.pareto(home / "dense", home / "out", **how, **SMALL)
    return home, found, how


def test_the_record_has_quality_cost_and_what_cannot_be(front):
    home, found, _ = front
    dense, *small = found.points()
    assert (dense.speed, dense.share, dense.divergence) == (1, 1, {})
    assert dense.kept == (1 if dense.accuracy else None)  # a random model may know nothing
    assert [(point.name, point.recipe) for point in small] == [
        ("svd-retain-0.4", "svd"),
        ("laser-retain-0.4", "laser"),
    ]
    for point in small:
        assert point.share == point.bytes / dense.bytes
        assert point.divergence.keys() == {"text", "image"}
        assert None not in (point.accuracy, point.perplexity, point.decode, point.memory_bytes)
    assert [one.directory is None for one in found.attempts] == [True, False] * 2
    assert all("give at least" in line for line in found.lines())
    again, silent = Frontier.read(home / "out" / "results.json"), found.evaluation.results
    silent = tuple(replace(result, answers=()) for result in silent)  # the file has examples alone
    assert again == replace(found, evaluation=replace(found.evaluation, results=silent))
    assert EvaluationReport.read(home / "out" / "results.json").reference == found.evaluation.reference


def test_finished_checkpoints_are_kept_and_those_of_others_refused(front, monkeypatch):
    home, found, how = front
    before = {path: path.stat().st_mtime_ns for path in (home / "out").rglob("*.safetensors")}
    trials = sys.modules["spectrim.pipeline.trials"]
    with monkeypatch.context() as patch:
        patch.setattr(trials, "evaluate", lambda *_, **__: found.evaluation)
        patch.setattr(trials, "bench", lambda *_, **__: found.bench)
        spectrim.pareto(home / "dense", home / "out", **how, **SMALL)
        assert {path: path.stat().st_mtime_ns for path in (home / "out").rglob("*.safetensors")} == before
        made = home / "out" / "svd-retain-0.4"
        kept = made.rename(home / "elsewhere")  # as an interrupted run leaves it
        spectrim.pareto(home / "dense", home / "out", **how, **SMALL)
        assert (made / "plan.json").read_text() == (kept / "plan.json").read_text()
    with pytest.raises(CheckpointError, match="another recipe or size"):
        spectrim.pareto(home / "dense", home / "out", **how, changes={"allocation.keep": ["*.q_proj"]}, **SMALL)
    (home / "out" / "pareto.json").write_text("{}")
    with pytest.raises(CheckpointError, match="other statistics"):
        spectrim.pareto(home / "dense", home / "out", **how, **SMALL)
    with pytest.raises(BudgetError, match="no recipe reaches any"):
        spectrim.pareto(home / "dense", home / "none", **{**how, "sizes": ["1kB"]}, **SMALL)


def test_models_beside_the_dense_one_are_put_on_its_scale(front):
    dense, first, second = front[1].bench.rows
    slow = replace(dense, decode=replace(dense.decode, median=2 * dense.decode.median))
    late = replace(second, decode=replace(second.decode, median=2 * second.decode.median))
    pairs = [replace(front[1].bench, rows=rows) for rows in ((dense, first), (slow, late))]
    joined = beside_dense(pairs)
    assert [row.model for row in joined.rows] == [row.model for row in front[1].bench.rows]
    assert joined.rows[2].decode.median == pytest.approx(second.decode.ratio * dense.decode.median)


@pytest.fixture(scope="module")
def page(front):
    home, _, _ = front
    return report([home / "out" / "results.json", home / "stats"], home / "page.html")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which `apt-get install chromium` brings")
def test_a_browser_draws_every_chart_without_complaint(page, tmp_path):
    document, said, marks = opened(page, tmp_path / "profile")
    assert said == []
    assert len(marks) > 20
    assert all(marks.values()), marks
    assert document.count("<article") == MOST


def test_the_page_has_every_section_and_needs_no_network(page, front):
    text = page.read_text()
    for heading in (
        "Results", "Quality over cost", "Questions about images", "Predicted and measured loss", "Where the bytes went",
        "What text-only whitening misses", "Speed and memory",
    ):  # fmt: skip
        assert f">{heading}</h2>" in text, heading
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!data:|#)', outside)
    assert "svd-size-1kB cannot be" in text
    assert str(front[0]) not in text
    assert "@media print" in text


def test_equal_results_give_equal_pages(front):
    home, _, _ = front
    pages = [report(home / "out", home / f"{name}.html").read_bytes() for name in "ab"]
    assert pages[0] == pages[1]
    assert report([home / "out"], home / "a.html").read_bytes() == pages[0]  # replaced


def test_names_and_answers_are_text_and_no_markup(front, tmp_path):
    _, found, _ = front
    results = tuple(
        replace(result, directory=f"{HARMFUL}{n}" if n else result.directory)
        for n, result in enumerate(found.evaluation.results)
    )
    examples = tuple(
        replace(one, question=HARMFUL, expected=HARMFUL, given=(HARMFUL,) * 3, image='x" onerror="alert(1)')
        for one in found.evaluation.examples
    )
    attempts = (Attempt(HARMFUL, HARMFUL, None, HARMFUL), Attempt(HARMFUL, "size-1", f"{HARMFUL}1", None))
    harmful = Frontier(replace(found.evaluation, results=results, examples=examples), None, attempts)
    harmful.write(tmp_path / "results.json")
    text = report(tmp_path / "results.json", tmp_path / "page.html").read_text()
    assert "<script>alert" not in text
    assert 'onerror="alert' not in text
    assert "&lt;script&gt;alert" in text


def test_a_perplexity_beyond_all_numbers_is_in_the_table_and_in_no_chart(front, tmp_path):
    _, found, _ = front
    dense, first, last = found.evaluation.results
    lost = replace(last, perplexity=replace(last.perplexity, per_token=math.inf), divergence=())
    Frontier(replace(found.evaluation, results=(dense, first, lost)), found.bench).write(tmp_path / "results.json")
    text = report(tmp_path / "results.json", tmp_path / "page.html").read_text()
    charts = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text)[1]
    assert "Infinity" not in charts
    assert len(json.loads(charts)) > 10
    assert ">inf</td>" in text


def test_cells_are_the_linears_of_the_plan(front):
    checkpoint = front[0] / "out" / "svd-retain-0.4"
    plan = json.loads((checkpoint / "plan.json").read_text())["linears"]
    found = layout(checkpoint)
    assert found.recipe == "svd"
    assert {cell.part for cell in found.cells} == {"tower", "connector", "backbone"}
    assert sum(cell.linears for cell in found.cells) == len(plan)
    assert sum(cell.bytes for cell in found.cells) == sum(row["bytes"] for row in plan.values())
    (cell,) = (c for c in found.cells if (c.part, c.block, c.role) == ("backbone", 1, "gate"))
    row = plan["model.language_model.layers.1.mlp.gate_proj"]
    assert (cell.rank, cell.bits) == (row["rank"], pytest.approx(32 * row["bytes"] / row["dense_bytes"]))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A checkpoint of a mixture of experts, and its statistics."""
    home = tmp_path_factory.mktemp("mixture")
    samples = {"text": "builtin", "images": None, "samples": 8, "seqlen": 12, "batch_size": 4}
    statistics = spectrim.calibrate(
        FAMILIES["mixtral"](), home / "stats", processor=word_tokenizer(), gradients=False, curvature=False, **samples
    )
    with spectrim.compression(FAMILIES["mixtral"](), "svd-llm", stats=statistics) as prepared:
        prepared.save(prepared.plan(0.5), home / "small")
    return home / "small", statistics


def test_experts_are_shown_with_the_tokens_that_they_saw(mixture):
    checkpoint, statistics = mixture
    found = layout(checkpoint)
    plan = json.loads((checkpoint / "plan.json").read_text())["linears"]
    assert {(one.block, one.number) for one in found.experts} == {(b, e) for b in range(2) for e in range(4)}
    for one in found.experts:
        name = f"model.layers.{one.block}.mlp.experts.{one.number}"
        rows = [plan[f"{name}.{role}"] for role in ("w1", "w2", "w3")]
        assert one.tokens == statistics.positions(f"{name}.w1", "text")
        assert one.bytes == sum(row["bytes"] for row in rows)
        assert one.bits == pytest.approx(32 * one.bytes / sum(row["dense_bytes"] for row in rows))
    assert sum(one.tokens for one in found.experts) == 2 * 2 * 8 * 12


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which `apt-get install chromium` brings")
def test_a_browser_draws_experts(mixture, tmp_path):
    page = report([mixture[0]], tmp_path / "page.html")
    text = page.read_text()
    assert text.count(">Experts by tokens</h4>") == 1
    assert "Each point is one of 8 experts" in text
    _, said, marks = opened(page, tmp_path / "profile")
    assert said == []
    assert [*marks.values()][-1] >= 8


def test_models_without_experts_have_no_chart_of_them(front, page):
    assert layout(front[0] / "out" / "svd-retain-0.4").experts == ()
    assert ">Experts by tokens</h4>" not in page.read_text()


def test_an_embedding_in_integers_is_a_cell_of_its_own(tmp_path):
    with spectrim.compression(FAMILIES["llama"](), "svd", changes={"quantize.embeddings": 8}) as prepared:
        plan = prepared.plan(0.6)
        prepared.save(plan, tmp_path / "small")
    found = [cell for cell in layout(tmp_path / "small").cells if cell.part == "embeddings"]
    assert sum(cell.bytes for cell in found) == sum(row.bytes for row in plan.tables.values()) > 0
    assert all(8 <= cell.bits < 10 for cell in found)


def test_a_model_that_cannot_be_built_is_laid_out_by_names(front, tmp_path):
    made = front[0] / "out" / "svd-retain-0.4"
    for name in ("spectrim.json", "plan.json"):
        (tmp_path / name).write_text((made / name).read_text())
    (tmp_path / "config.json").write_text('{"model_type": "nobody-knows"}')
    cells = layout(tmp_path).cells
    assert {cell.part for cell in cells} >= {"tower", "backbone"}
    assert sum(cell.bytes for cell in cells) == sum(cell.bytes for cell in layout(made).cells)


def test_a_language_model_is_all_backbone(tmp_path):
    with spectrim.compression(FAMILIES["llama"](), "svd") as prepared:
        prepared.save(prepared.plan(0.6), tmp_path / "small")
    assert {cell.part for cell in layout(tmp_path / "small").cells} == {"backbone"}


def test_results_of_evaluate_and_bench_join(tmp_path, front):
    _, found, _ = front
    found.evaluation.write(tmp_path / "evaluated.json")
    found.bench.write(tmp_path / "bench.json")
    read_back = read([tmp_path / "evaluated.json", tmp_path / "bench.json"])
    (joined,) = read_back.frontiers
    points = joined.points(read_back.benches[0].rows)
    assert [point.speed for point in points] == [point.speed for point in found.points()]
    assert {point.recipe for point in points} == {None, "svd", "laser"}  # from the checkpoints
    write_page(read_back, tmp_path / "page.html")
    assert "Quality over cost" in (tmp_path / "page.html").read_text()


def test_examples_are_few_and_begin_with_what_was_lost():
    questions = [q for q in make_questions() for _ in range(8)]
    right = [Answer(q.task, q.question, q.answer, q.answer) for q in questions]
    lost = [replace(answer, given="two") if number in (5, 77) else answer for number, answer in enumerate(right)]
    found = chosen(questions, [right, lost, lost], 0)
    assert len(found) == MOST
    assert [one.correct for one in found[:3]] == [(True, False, False)] * 2 + [(True,) * 3]
    assert {one.task for one in found} == {"colour", "count"}
    assert chosen([], [], None) == ()
    also = [replace(answer, given="two") if number == 9 else answer for number, answer in enumerate(right)]
    assert [one.correct[0] for one in chosen(questions, [also, lost], 0)][:3] == [True] * 3  # not what nobody knew


def test_what_no_page_shows_is_refused(front, tmp_path, monkeypatch):
    home, _, _ = front
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "bench.json").write_text('{"rows": 1, "about": ""}')
    (tmp_path / "empty").mkdir()
    results, out = home / "out" / "results.json", tmp_path / "page.html"
    damaged = json.loads(results.read_text())
    (tmp_path / "damaged.json").write_text(json.dumps({**damaged, "bench": {"rows": 3}}))
    for error, message, arguments in (
        (ReportError, "nothing is named", ([], out)),
        (ReportError, "named twice", ([results, results], out)),
        (ReportError, "list.json is not a JSON object", (tmp_path / "list.json", out)),
        (ReportError, "holds nothing that the page shows", (tmp_path / "other.json", out)),
        (ReportError, "bench.json is damaged", (tmp_path / "bench.json", out)),
        (SampleError, "no record of a benchmark", (tmp_path / "damaged.json", out)),
        (ReportError, "holds no results", (tmp_path / "empty", out)),
        (ReportError, "name it by --model", (home / "stats", out)),
        (UsageError, "is no page of spectrim report", (results, tmp_path / "mine.html")),
        (UsageError, "is a directory", (results, tmp_path)),
    ):
        with pytest.raises(error, match=message):
            report(*arguments)
    with pytest.raises(ReportError, match="no effect without statistics"):
        report(results, out, model="demo")
    monkeypatch.setattr(sys.modules["spectrim.report.writing"], "find_spec", lambda name: None)
    with pytest.raises(ReportError, match=r"pip install \"spectrim\[report\]\""):
        report(results, out)
    assert not out.exists()


def test_the_command_says_where_the_page_is(front, tmp_path, capsys):
    code, out, _ = run(capsys, "report", front[0] / "out", "-o", tmp_path / "page.html")
    assert (code, out) == (0, f"page: {tmp_path / 'page.html'}")
