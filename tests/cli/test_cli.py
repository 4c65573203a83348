"""The command line on the built-in model: every verb once, and one sentence and exit code 2 for the user's mistakes."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import spectrim
from helpers.command import run
from helpers.forks import fork
from spectrim.checkpoint import read_provenance
from spectrim.demo import resolve


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "statistics"
    source = resolve("demo")
    processor = spectrim.load_processor(source)
    options = {"samples": 8, "seqlen": 64, "batch_size": 8, "curvature": True}
    spectrim.calibrate(spectrim.load(source), path, processor=processor, **options)
    return path


@pytest.fixture(scope="module")
def budgets(statistics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model at two budgets."""
    out = tmp_path_factory.mktemp("budgets")
    done = fork(
        "-m",
        "spectrim",
        "compress",
        "demo",
        "-o",
        out,
        "--retain",
        "0.5",
        "--retain",
        "0.4",
        "--stats",
        statistics,
        "--recipe",
        "curvature",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bytes of linears") == 2
    return out


def test_anatomy_names_the_parts_of_the_built_in_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "anatomy", "demo")
    assert code == 0
    for part in ("vision_tower", "multi_modal_projector", "language_model", "gate", "tied to", "embedding"):
        assert part in out


def test_recipes_are_listed_with_their_papers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    for word in ("jw-svd", "svd-llm", "asvd", "fwsvd", "ACL 2026", "ICLR 2025"):
        assert word in out


def test_compress_evaluate_and_load(capsys: pytest.CaptureFixture[str], budgets: Path, tmp_path: Path) -> None:
    assert {path.name for path in budgets.iterdir()} == {"retain-0.5", "retain-0.4"}
    small = budgets / "retain-0.5"
    record = read_provenance(small)
    assert record["recipe"]["name"] == "curvature"
    assert 0.49 < record["retention"]["bytes"] <= 0.5
    assert (small / "plan.json").exists()

    model = AutoModelForImageTextToText.from_pretrained(small)
    assert model.dtype == torch.bfloat16
    dense = sum(p.numel() for p in spectrim.load(resolve("demo")).parameters())
    assert sum(p.numel() for p in model.parameters()) < dense

    results = tmp_path / "results.json"
    code, out, err = run(
        capsys, "evaluate", "demo", small, "--samples", "2", "--max-tokens", "256", "--dtype", "float32",
        "--json", results, "--card",
    )  # fmt: skip
    assert code == 0, err
    card = (small / "README.md").read_text()
    measured = json.loads(results.read_text())["results"]
    for row in (
        [f"{x['perplexity']['per_token']:.2f}" for x in reversed(measured)],
        ["mean of the tasks, %", *(f"{100 * x['vqa']['mean']:.1f}" for x in reversed(measured))],
    ):
        assert f"| {' | '.join(row)} |" in card
    assert "retain-0.5" in out
    assert "blind floor" in out
    assert "questions/s" in out
    assert re.search(r"(?<!\\)\[[-+]\d+\.\d, [-+]\d+\.\d\]", out)  # an interval, not taken for markup nor escaped
    assert len(json.loads(results.read_text())["results"]) == 2


def test_an_edited_plan_is_obeyed(
    capsys: pytest.CaptureFixture[str], statistics: Path, budgets: Path, tmp_path: Path
) -> None:
    plan = json.loads((budgets / "retain-0.4" / "plan.json").read_text())
    name = next(iter(plan["linears"]))
    plan["linears"][name]["rank"] = 3
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    code, out, err = run(
        capsys, "compress", "demo", "-o", tmp_path / "b", "--plan", tmp_path / "plan.json", "--stats", statistics
    )
    assert code == 0, err
    assert "bytes of linears" in out
    assert spectrim.load(tmp_path / "b").get_submodule(name).rank == 3


def test_inspect_writes_its_findings(capsys: pytest.CaptureFixture[str], statistics: Path, tmp_path: Path) -> None:
    code, _, err = run(capsys, "inspect", "demo", "--stats", statistics, "-o", tmp_path / "report", "--no-plots")
    assert code == 0, err
    assert (tmp_path / "report" / "inspection.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "demo", "-o", "OUT"], "--retain 0.6"),
        (["compress", "demo", "-o", "OUT", "--retain", "1.5", "--stats", "STATS"], "between 0 and 1"),
        (["compress", "demo", "-o", "OUT", "--retain", "0.0001", "--stats", "STATS"], "raise --retain"),
        (["compress", "demo", "-o", "OUT", "--retain", "0.5", "--recipe", "magic"], "no recipe 'magic'"),
        (["compress", "demo", "-o", "OUT", "--retain", "0.5", "--set", "metric.bta=1"], "metric.bta"),
        (["compress", "demo", "-o", "OUT", "--retain", "0.5", "--set", "metric.gamma"], "has no value"),
        (["compress", "demo", "-o", "OUT", "--retain", "0.5", "--recipe", "fwsvd", "--stats", "STATS"], "--gradients"),
        (["compress", "demo", "-o", "OUT", "--retain", "0.5", "--stats", "OUT"], "no statistics directory"),
        (["compress", "demo", "-o", "OUT", "--plan", "OUT/plan.json", "--stats", "STATS"], "is no plan"),
        (["compress", "./nowhere", "-o", "OUT", "--retain", "0.5"], "./nowhere does not exist"),
        (["calibrate", "demo", "-o", "OUT", "--text", "none", "--images", "none"], "needs samples"),
        (["calibrate", "demo", "-o", "OUT", "--samples", "100000"], "has"),
        (["calibrate", "demo", "-o", "OUT", "--text", "./missing.txt"], "missing.txt"),
        (["evaluate", "demo", "--tasks", "chess"], "no evaluation task 'chess'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], statistics: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"STATS": str(statistics), "OUT": str(tmp_path / "out")}
    real = [places.get(a, a.replace("OUT/", f"{tmp_path}/out/")) for a in arguments]
    code, _, err = run(capsys, *real)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_calibration_of_several_sources(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "word " * 200}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    (tmp_path / "b.csv").write_text("body,id\n" + "text " * 400 + ",1\n")
    sources = [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.csv[body]:3"]
    code, out, err = run(
        capsys, "calibrate", "demo", "-o", tmp_path / "s", "--text", sources[0], "--text", sources[1], "--images",
        "none", "--samples", "4", "--seqlen", "16", "--no-curvature",
    )  # fmt: skip
    assert code == 0, err
    assert "moments of 4 text samples" in out
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["data"]["text"] == sources
