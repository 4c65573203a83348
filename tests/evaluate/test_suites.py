"""Suites in lm-eval with local task files, in memory and from disk; lmms-eval by what it is asked for."""

import json
import shutil
import sys
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from compressed import factored
from helpers.command import run
from helpers.evaluated import COLOURS, make_llama, make_llava, make_processor, make_questions, make_tokenizer
from helpers.forks import Fork
from spectrim.checkpoint import load, load_processor, save
from spectrim.errors import SampleError
from spectrim.evaluate import harnesses, vqa
from spectrim.evaluate.harnesses import LMMS_MODELS, run_suite, task_manager
from spectrim.evaluate.suites import Score, Suite, SuiteReport, read_scores, suite_names, suite_table
from spectrim.harness import main

BUILTIN = {
    "arena": [
        "boolq", "arc_easy", "arc_challenge", "winogrande", "piqa", "hellaswag", "openbookqa", "mathqa",
        "arena_mmlu_mathematics", "wikitext", "c4",
    ],
    "adasvd": ["mmlu", "arc_easy", "winogrande", "hellaswag", "piqa"],
    "jw-svd": [
        "mme", "blink", "hallusion_bench_image", "ocrbench", "mmmu_val", "mathvista_testmini", "seedbench",
        "scienceqa_img",
    ],
}  # fmt: skip
TEXT_TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/colours.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
IMAGE_TASK = """
task: shown
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/shown.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: generate_until
doc_to_image: !function shown.images
doc_to_text: "<image>{{question}}"
doc_to_target: answer
process_results: !function shown.right
generation_kwargs: {until: ["</s>"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""
IMAGE_CODE = """
from PIL import Image

def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def right(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    processor = make_processor()
    processor.tokenizer = make_tokenizer()  # the template writes BOS; lm-eval would let the tokenizer add another
    return save(factored("llava", make_llava()), tmp_path_factory.mktemp("suites") / "small", processor=processor)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = factored("llama", make_llama().float())
    return save(model, tmp_path_factory.mktemp("suites") / "language", processor=make_tokenizer())


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tasks(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of local tasks, one for the module, since lm-eval reads all of its own along with them; beside them
    those of the arena, which the package must hold.
    """
    folder = tmp_path_factory.mktemp("tasks")
    shutil.copytree(Suite.read("arena").task_folder, folder / "arena")
    rows = [{"question": f"What is {c}", "choices": [c, "a shape"], "answer": n % 2} for n, c in enumerate(COLOURS)]
    write_lines(folder / "colours.jsonl", rows)
    (folder / "colours.yaml").write_text(TEXT_TASK.replace("FOLDER", str(folder)))
    lost = TEXT_TASK.replace("FOLDER/colours", "FOLDER/lost").replace("task: colours", "task: lost")
    (folder / "lost.yaml").write_text(lost.replace("FOLDER", str(folder)))
    asked = [question for question in make_questions() if question.task == "colour"]
    said = vqa(load(checkpoint), load_processor(checkpoint), asked)
    assert len({answer.given for answer in said}) > 1  # the model looks
    rows = []
    for number, (question, answer) in enumerate(zip(asked, said, strict=True)):
        question.image.save(folder / f"{number}.png")
        # Every other answer is what the model says by the generation of `spectrim evaluate`.
        given = answer.given if number % 2 else f"not {answer.given}"
        rows.append({"image": str(folder / f"{number}.png"), "question": question.question, "answer": given})
    write_lines(folder / "shown.jsonl", rows)
    (folder / "shown.yaml").write_text(IMAGE_TASK.replace("FOLDER", str(folder)))
    (folder / "shown.py").write_text(IMAGE_CODE)
    (folder / "text-suite.yml").write_text("name: local\nharness: lm-eval\ntasks: [colours]\ntask_folder: .\n")
    (folder / "image-suite.yml").write_text(
        "name: local\nharness: lm-eval\ntasks: [shown]\ntask_folder: .\nimages: true\n"
    )
    return folder


def share_right(folder: Path, checkpoint: Path) -> float:
    """The share of the text task that a model gets right, by one forward pass for each choice."""
    model, processor = load(checkpoint), load_processor(checkpoint)
    tokenizer = getattr(processor, "tokenizer", processor)
    rows = [json.loads(line) for line in (folder / "colours.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        losses = []
        for choice in row["choices"]:
            start = tokenizer(row["question"], return_tensors="pt").input_ids
            whole = tokenizer(f"{row['question']} {choice}", return_tensors="pt").input_ids
            logits = model(whole).logits.double().log_softmax(-1)[0, start.shape[1] - 1 : -1]
            losses.append(logits.gather(1, whole[0, start.shape[1] :, None]).sum().item())
        right += int(losses[1] > losses[0]) == row["answer"]
    return right / len(rows)


HARNESS = """
import sys
from functools import partial
from spectrim.harness import main
import lm_eval.tasks
lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # which are thousands of files
for sys.argv in COMMANDS:
    main()
"""


@pytest.fixture(scope="module")
def harness(tasks: Path, checkpoint: Path, language: Path) -> Fork:
    """The harness's own command line, with both of its classes, in one process that runs beside the tests."""
    commands = []
    for kind, model, task in (("hf", language, "colours"), ("hf-multimodal", checkpoint, "shown")):
        command = ["harness", "lm_eval", "--model", kind, "--tasks", task, "--include_path", str(tasks)]
        command += ["--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
        command += ["--output_path", str(tasks / "out" / kind)]
        commands.append(command + (["--apply_chat_template"] if kind == "hf-multimodal" else []))
    return Fork("-c", HARNESS.replace("COMMANDS", repr(commands)))


@pytest.fixture(scope="module")
def from_disk(tasks: Path, harness: Fork) -> Path:
    """The results that it wrote."""
    done = harness.done()
    assert done.returncode == 0, done.stderr[-2000:]
    return tasks / "out"


@pytest.mark.filterwarnings("ignore")  # of lm-eval and datasets
@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("kind", ["hf", "hf-multimodal"])
def test_lm_eval_scores_a_checkpoint_in_memory_and_from_disk(
    kind: str, request: pytest.FixtureRequest, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The score is that of an independent computation, by `evaluate --suite` and by the harness's own command."""
    pytest.importorskip("lm_eval")
    text = kind == "hf"
    model: Path = request.getfixturevalue("language" if text else "checkpoint")
    task, metric, suite = ("colours", "acc", "text-suite") if text else ("shown", "right", "image-suite")
    expected = share_right(tasks, model) if text else 0.5
    results = tmp_path / "out" / "results.json"
    capsys.readouterr()
    code, out, _ = run(
        capsys, "evaluate", model, "--suite", tasks / f"{suite}.yml", "--device", "cpu", "--json", results
    )
    assert code == 0
    [score] = json.loads(results.read_text())["scores"][str(model)]
    assert (score["metric"], score["value"]) == (metric, expected)
    assert f"{expected:.4f}" in out
    [written] = (request.getfixturevalue("from_disk") / kind).rglob("results_*.json")
    assert json.loads(written.read_text())["results"][task][f"{metric},none"] == expected


@pytest.mark.filterwarnings("ignore")
def test_an_image_text_model_runs_text_tasks_in_memory(checkpoint: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    [score] = run_suite(Suite.read(tasks / "text-suite.yml"), [checkpoint], device="cpu").scores[str(checkpoint)]
    assert score.value == share_right(tasks, checkpoint)


def test_the_suites_of_the_papers_are_plain_data() -> None:
    assert suite_names() == tuple(sorted(BUILTIN))
    for name, tasks in BUILTIN.items():
        assert list(Suite.read(name).tasks) == tasks


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_has_the_tasks_of_its_suite(tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    assert set(BUILTIN["adasvd"]) <= set(task_manager(str(tasks)).all_tasks)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_has_the_tasks_of_the_arena_and_its_group(tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    manager = task_manager(str(tasks))
    assert set(Suite.read("arena").tasks) <= set(manager.all_tasks)
    (group,) = (tasks / "arena").glob("*.yaml")
    assert {line.split("- ")[1] for line in group.read_text().splitlines() if "- mmlu" in line} <= set(
        manager.all_tasks
    )


def test_quality_retention_is_the_mean_of_the_ratios_to_the_first_model() -> None:
    def scores(a: float, b: float, perplexity: float) -> tuple[Score, ...]:
        found = (Score("a", "acc", a, None), Score("a", "acc_norm", 0.9, None), Score("b", "acc", b, None))
        return (*found, Score("c", "word_perplexity", perplexity, None))

    suite = Suite(name="local", harness="lm-eval", tasks=("a", "b", "c"), retention="acc")
    both = {"dense": scores(0.5, 0.8, 10.0), "small": scores(0.25, 0.6, 20.0)}
    report = SuiteReport(suite=suite, date="", versions={}, limit=None, scores=both)
    assert report.retention() == {"dense": 1.0, "small": pytest.approx((0.5 + 0.75) / 2)}
    assert json.loads(report.json())["retention"]["small"] == pytest.approx(0.625)
    console = Console(width=120, record=True, file=StringIO())
    console.print(suite_table(report))
    assert "quality retention mean of acc ratios 1.0000 0.6250".split() in [
        line.split() for line in console.export_text().splitlines()
    ]
    nothing = SuiteReport(suite=suite, date="", versions={}, limit=None, scores={"dense": scores(0, 0, 1)})
    assert nothing.retention() == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nharness: lm-eval\ntasks: []\n", "key 'tasks'"),
        ("name: a\nharness: chess\ntasks: [b]\n", "key 'harness'"),
        ("name: a\nharness: lm-eval\ntasks: [b]\nshots: 3\n", "key 'shots'"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_malformed_suite_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(SampleError, match=message):
        Suite.read(tmp_path / "suite.yaml")
    with pytest.raises(SampleError, match="no suite 'chess'; choose from adasvd, arena, jw-svd"):
        Suite.read("chess")


@pytest.mark.parametrize(("suite", "module", "extra"), [("adasvd", "lm_eval", "eval"), ("jw-svd", "lmms_eval", "lmms")])
def test_without_the_extra_the_remedy_is_named(
    suite: str, module: str, extra: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(harnesses, "find_spec", lambda name: None if name == module else object())
    capsys.readouterr()
    code, _, err = run(capsys, "evaluate", checkpoint, "--suite", suite)
    assert code == 2
    assert f"pip install 'spectrim[{extra}]'" in err
    code, _, err = run(capsys, "evaluate", checkpoint, "--suite", suite, "--card")
    assert code == 2
    assert "not those of a suite" in err


@pytest.mark.filterwarnings("ignore")
def test_what_the_harness_lacks_is_one_sentence(checkpoint: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    for task, message in (("chess_openings", "no task 'chess_openings'"), ("lost", "check the network")):
        suite = Suite(name="local", harness="lm-eval", tasks=(task,), task_folder=str(tasks))
        with pytest.raises(SampleError, match=message):
            run_suite(suite, [checkpoint])


def test_lmms_eval_gets_the_directory_and_the_class_of_the_family(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the harness, which is too large for the tests, records what it is asked to do."""
    asked: dict[str, Any] = {}

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        asked.update(options)
        return {
            "results": {
                "mme": {
                    "alias": "mme",
                    "mme_score,none": 12.5,
                    "mme_score_stderr,none": "N/A",
                    "mme_score_stderr_clt,none": 0.5,
                }
            }
        }

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            self.all_tasks = ["mme"]

    names = ("lmms_eval", "lmms_eval.evaluator", "lmms_eval.tasks")
    for name, content in zip(
        names, ({}, {"simple_evaluate": simple_evaluate}, {"TaskManager": TaskManager}), strict=True
    ):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harnesses, "find_spec", lambda name: object())
    monkeypatch.setattr(harnesses, "versions", lambda *packages: dict.fromkeys(packages, "1"))
    suite = Suite(name="local", harness="lmms-eval", tasks=("mme",))
    report = run_suite(suite, [checkpoint], limit=3, device="cpu")
    assert (asked["model"], asked["model_args"]) == ("llava_hf", f"pretrained={checkpoint},device_map=cpu")
    assert (asked["tasks"], asked["limit"], asked["device"]) == (["mme"], 3, "cpu")
    [score] = report.scores[str(checkpoint)]
    assert (score.metric, score.value, score.error) == ("mme_score", 12.5, None)
    monkeypatch.setattr(harnesses, "LMMS_MODELS", {})
    with pytest.raises(SampleError, match="a llava; run lmms-eval itself"):
        run_suite(suite, [checkpoint])
    assert LMMS_MODELS["qwen2_5_vl"] == "qwen2_5_vl"


def test_scores_of_groups_and_filters() -> None:
    found = {
        "results": {
            "all": {"alias": "all"},
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 7},
            "b": {"acc,strict": 0.25, "acc_stderr,strict": "N/A", "note,none": "text"},
        },
        "group_subtasks": {"all": ["a", "b"]},
    }
    scores = read_scores(found, ["all"])
    assert [(s.task, s.metric, s.value, s.error) for s in scores] == [
        ("a", "acc", 0.5, 0.1),
        ("b", "acc (strict)", 0.25, None),
    ]
    with pytest.raises(SampleError, match="no score for task 'c'"):
        read_scores(found, ["c"])
    suite = Suite(name="local", harness="lm-eval", tasks=("all",))
    report = SuiteReport(suite=suite, date="", versions={}, limit=5, scores={"x/dense": scores, "x/small": scores[:1]})
    console = Console(width=120, record=True, file=StringIO())
    console.print(suite_table(report))
    shown = [line.split() for line in console.export_text().splitlines()]
    assert ["a", "acc", "0.5000", "±", "0.1000", "0.5000", "±", "0.1000"] in shown
    assert ["b", "acc", "(strict)", "0.2500", "–"] in shown


@pytest.mark.parametrize(("arguments", "message"), [([], "name a module"), (["no_such_harness"], "no module")])
def test_the_wrapper_of_harnesses_says_what_it_wants(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["harness", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
