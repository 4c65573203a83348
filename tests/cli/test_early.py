"""What can be known at once is said before any model is loaded, in one sentence, and nothing is written."""

import json
import sys
from pathlib import Path

import pytest
import torch

import spectrim
from families import FAMILIES
from helpers.command import run
from spectrim import cli
from spectrim.checks import check_file
from spectrim.demo import resolve
from spectrim.errors import BudgetError, SampleError, SpectrimError, UsageError
from spectrim.evaluate import evaluate


@pytest.fixture
def no_models(monkeypatch):
    """From here on, whoever loads a model fails the test."""

    def load(*arguments, **options):
        raise AssertionError("a model was loaded")

    for place in (
        "checkpoint",
        "pipeline.run",
        "evaluate.running",
        "evaluate.harnesses",
        "demonstration",
        "pipeline.trials",
        "report.reading",
    ):
        __import__(f"spectrim.{place}")
        monkeypatch.setattr(sys.modules[f"spectrim.{place}"], "load", load)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """Things that commands name; STATS are of the built-in model, without gradients or curvature."""
    home = tmp_path_factory.mktemp("early")
    source = resolve("demo")
    options = {"samples": 4, "seqlen": 16, "curvature": False}
    processor = spectrim.load_processor(source)
    spectrim.calibrate(spectrim.load(source), home / "STATS", processor=processor, **options)
    spectrim.calibrate(
        spectrim.load(source), home / "IMAGES", processor=processor, text=None, samples=4, curvature=False
    )
    (home / "FILE").write_text("x")
    (home / "HELD").mkdir()
    (home / "HELD" / "notes.txt").write_text("mine")
    (home / "BAD.json").write_text('{"version": 1, "version": 1')
    config = json.loads((Path(source) / "config.json").read_text())
    for name, method in (("QUANTIZED", "bitsandbytes"), ("UNKNOWN", "a_new_method"), ("SMALL", "spectrim")):
        (home / name).mkdir()
        quantization = {"quant_method": method, "version": 1, "ranks": {"a": 1}, "load_in_4bit": True}
        (home / name / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (home / "words.txt").write_text("words " * 3000)
    (home / "empty").mkdir()
    return {path.name: str(path) for path in home.iterdir()} | {"OUT": str(home / "OUT"), "HOME": str(home)}


PARETO = ["pareto", "demo", "-o", "OUT", "--stats", "STATS", "--recipes", "svd"]
COMPRESS = ["compress", "demo", "-o", "OUT"]
EARLY = [
    *([*COMPRESS, "--retain", value] for value in ("5", "0", "-1", "nan", "inf")),
    [*COMPRESS],
    [*COMPRESS, "--retain", "0.5", "--plan", "BAD.json"],
    [*COMPRESS, "--retain", "0.5", "--retain", "0.5"],
    [*COMPRESS, "--retain", "0.5", "--retain", ".50"],
    [*COMPRESS, "--plan", "HOME/none.json"],
    [*COMPRESS, "--plan", "BAD.json"],
    [*COMPRESS, "--plan", "empty"],
    [*COMPRESS, "--retain", "0.5", "--stats", "HOME/none"],
    [*COMPRESS, "--retain", "0.5", "--stats", "empty"],
    [*COMPRESS, "--retain", "0.5", "--stats", "STATS"],
    [*COMPRESS, "--retain", "0.5", "--stats", "STATS", "--recipe", "fwsvd"],
    [*COMPRESS, "--retain", "0.5", "--no-curvature"],
    [*COMPRESS, "--retain", "0.5", "--recipe", "fwsvd", "--no-gradients"],
    [*COMPRESS, "--retain", "0.5", "--recipe", "none"],
    [*COMPRESS, "--retain", "0.5", "--recipe", "none.yaml"],
    [*COMPRESS, "--retain", "0.5", "--set", "metric.bta=1"],
    [*COMPRESS, "--retain", "0.5", "--set", "metric.gamma"],
    [*COMPRESS, "--retain", "0.5", "--set", "=1"],
    [*COMPRESS, "--retain", "0.5", "--set", "metric.gamma=1", "--set", "metric.gamma=2"],
    [*COMPRESS, "--retain", "0.5", "--set", "allocation.places=[backbone"],
    [*COMPRESS, "--retain", "0.5", "--device", "foo"],
    [*COMPRESS, "--retain", "0.5", "--device", "meta"],
    [*COMPRESS, "--retain", "0.5", "--device", "cuda:99"],
    [*COMPRESS, "--retain", "0.5", "--dtype", "int8"],
    [*COMPRESS, "--retain", "0.5", "--samples", "0"],
    [*COMPRESS, "--retain", "0.5", "--seqlen", "-3"],
    [*COMPRESS, "--retain", "0.5", "--batch-size", "0"],
    [*COMPRESS, "--retain", "0.5", "--seed", "-1"],
    [*COMPRESS, "--retain", "0.5", "--text", "HOME/none.txt"],
    [*COMPRESS, "--retain", "0.5", "--text", "none.md"],
    [*COMPRESS, "--retain", "0.5", "--text", "empty"],
    [*COMPRESS, "--retain", "0.5", "--images", "./none"],
    [*COMPRESS, "--retain", "0.5", "--images", "empty"],
    [*COMPRESS, "--retain", "0.5", "--text", "none", "--images", "none"],
    [*COMPRESS, "--retain", "0.5", "--curvature-form", "gate"],
    ["compress", "demo", "-o", "FILE", "--retain", "0.5"],
    ["compress", "demo", "-o", "FILE/x", "--retain", "0.5"],
    ["compress", "demo", "-o", "HELD", "--retain", "0.5"],
    ["compress", "demo", "-o", "HELD", "--retain", "0.5", "--overwrite"],
    ["compress", "demo", "-o", ".", "--retain", "0.5"],
    ["compress", "demo", "-o", "STATS", "--retain", "0.5", "--recipe", "jw-svd", "--stats", "STATS", "--overwrite"],
    ["compress", "demo", "-o", "/proc/none/x", "--retain", "0.5"],
    ["compress", "QUANTIZED", "-o", "OUT", "--retain", "0.5"],
    ["compress", "UNKNOWN", "-o", "OUT", "--retain", "0.5"],
    ["compress", "SMALL", "-o", "OUT", "--retain", "0.5"],
    ["compress", "./nowhere", "-o", "OUT", "--retain", "0.5"],
    # Options that do nothing there.
    [*COMPRESS, "--retain", "0.5", "--recipe", "jw-svd", "--stats", "STATS", "--samples", "8"],
    [*COMPRESS, "--retain", "0.5", "--recipe", "jw-svd", "--stats", "STATS", "--text", "builtin"],
    [*COMPRESS, "--retain", "0.5", "--recipe", "svd", "--samples", "8"],
    [*COMPRESS, "--retain", "0.5", "--recipe", "jw-svd", "--labels", "given"],
    [*COMPRESS, "--retain", "0.5", "--recipe", "jw-svd", "--curvature-form", "q=diagonal"],
    [*COMPRESS, "--retain", "0.5", "--memory", "20 apples"],
    ["calibrate", "demo", "-o", "OUT", "--memory", "0GiB"],
    [*COMPRESS, "--retain", "0.5", "--images", "none", "--instruction", "Look."],
    ["calibrate", "demo", "-o", "OUT", "--text", "none", "--seqlen", "64"],
    ["calibrate", "demo", "-o", "OUT", "--no-curvature", "--curvature-form", "q=diagonal"],
    ["calibrate", "demo", "-o", "FILE"],
    ["calibrate", "demo", "-o", "FILE/x"],
    ["calibrate", "demo", "-o", "HELD"],
    ["calibrate", "demo", "-o", "OUT", "--samples", "0"],
    ["calibrate", "demo", "-o", "OUT", "--text", "none.jsonl"],
    ["calibrate", "demo", "-o", "OUT", "--device", "foo"],
    ["calibrate", "demo", "-o", "OUT", "--curvature-gib", "8"],
    ["calibrate", "demo", "-o", "OUT", "--curvature-form", "gate=full", "--curvature-form", "gate=diagonal"],
    ["calibrate", "QUANTIZED", "-o", "OUT"],
    *([*PARETO, "--sizes", sizes] for sizes in ("", "6MB,6MB", "6 apples", "140%", "x%", "0.4")),
    ["pareto", "demo", "-o", "FILE", "--stats", "STATS", "--sizes", "40%", "--recipes", "svd"],
    ["pareto", "demo", "-o", "OUT", "--stats", "empty", "--sizes", "40%"],
    ["pareto", "demo", "-o", "OUT", "--stats", "STATS", "--sizes", "40%"],
    [*PARETO, "--sizes", "40%", "--recipes", "svd,svd"],
    [*PARETO, "--sizes", "40%", "--recipes", "none"],
    [*PARETO, "--sizes", "40%", "--tasks", "chess"],
    [*PARETO, "--sizes", "40%", "--questions", "none.jsonl"],
    [*PARETO, "--sizes", "40%", "--text", "none.txt"],
    [*PARETO, "--sizes", "40%", "--device", "foo"],
    ["pareto", "empty", "-o", "OUT", "--stats", "STATS", "--sizes", "40%", "--recipes", "svd"],
    ["pareto", "SMALL", "-o", "OUT", "--stats", "STATS", "--sizes", "40%", "--recipes", "svd"],
    ["report", "HOME/none.json", "-o", "OUT"],
    ["report", "BAD.json", "-o", "OUT"],
    ["report", "FILE", "-o", "OUT"],
    ["report", "empty", "-o", "OUT"],
    ["report", "SMALL", "-o", "OUT"],
    ["report", "STATS", "-o", "OUT"],
    ["report", "STATS", "STATS", "-o", "OUT"],
    ["report", "IMAGES", "-o", "OUT", "--model", "demo"],
    ["report", "STATS", "-o", "FILE", "--model", "demo"],
    ["report", "STATS", "-o", "empty", "--model", "demo"],
    ["report", "STATS", "-o", "FILE/x.html", "--model", "demo"],
    ["calibrate", "demo", "-o", "OUT", "--text", "words.txt:0.5"],
    ["calibrate", "demo", "-o", "OUT", "--text", "words.txt", "--text", "words.txt:2"],
    ["calibrate", "demo", "-o", "OUT", "--text", "words.txt", "--text", "none"],
    ["calibrate", "demo", "-o", "OUT", "--text", "words.txt:0.001", "--text", "builtin", "--samples", "8"],
    ["calibrate", "demo", "-o", "OUT", "--text", "words.txt[text]"],
    ["calibrate", "demo", "-o", "OUT", "--images", "none.parquet[image=a]"],
    ["inspect", "demo", "--stats", "STATS", "-o", "OUT", "--device", "foo"],
    ["inspect", "demo", "--stats", "STATS", "-o", "OUT", "--dtype", "int8"],
    ["demo", "-o", "OUT", "--device", "foo"],
    ["demo", "-o", "OUT", "--dtype", "int8"],
    ["inspect", "demo", "--stats", "STATS", "-o", "FILE"],
    ["inspect", "demo", "--stats", "STATS", "-o", "OUT", "--retain", "2"],
    ["inspect", "demo", "--stats", "empty", "-o", "OUT"],
    ["inspect", "demo", "--stats", "IMAGES", "-o", "OUT"],
    ["inspect", "QUANTIZED", "--stats", "STATS", "-o", "OUT"],
    ["evaluate", "demo", "--tasks", ""],
    ["evaluate", "demo", "--tasks", "vqa,"],
    ["evaluate", "demo", "--tasks", "perplexity,perplexity"],
    ["evaluate", "demo", "demo"],
    ["evaluate", "demo", "--json", "empty"],
    ["evaluate", "demo", "--json", "FILE/x.json"],
    ["evaluate", "demo", "--batch-size", "0"],
    ["evaluate", "demo", "--stride", "0"],
    ["evaluate", "demo", "--stride", "600"],
    ["evaluate", "demo", "--max-tokens", "0"],
    ["evaluate", "demo", "--samples", "0"],
    ["evaluate", "demo", "--device", "cuda:99"],
    ["evaluate", "demo", "--dtype", "float8"],
    ["evaluate", "demo", "--text", "none.txt"],
    ["evaluate", "demo", "--questions", "none.jsonl"],
    ["evaluate", "empty"],
    ["evaluate", "demo", "--limit", "3"],
    ["evaluate", "demo", "--card"],
    ["evaluate", "demo", "--tasks", "vqa", "--stride", "8"],
    ["evaluate", "demo", "--tasks", "vqa", "--max-tokens", "8"],
    ["evaluate", "demo", "--tasks", "vqa", "--text", "words.txt"],
    ["evaluate", "demo", "--tasks", "perplexity", "--questions", "builtin"],
    ["evaluate", "demo", "--suite", "adasvd", "--text", "words.txt"],
    ["evaluate", "demo", "--suite", "adasvd", "--tasks", "vqa"],
    ["evaluate", "demo", "--suite", "adasvd", "--card"],
    ["evaluate", "demo", "--suite", "adasvd", "--limit", "0"],
    ["evaluate", "demo", "--suite", "none"],
    ["evaluate", "demo", "demo", "--suite", "adasvd"],
    ["demo", "--samples", "0"],
    ["demo", "-o", "FILE"],
    ["demo", "-o", "FILE/x"],
    ["push", "empty", "owner/name"],
]


def tree(home: str) -> dict[str, tuple[int, int] | None]:
    """What is there; of files, when they were written last and their size."""
    found = {str(path): (path.is_file(), path.stat()) for path in Path(home).rglob("*")}
    return {name: (at.st_mtime_ns, at.st_size) if is_file else None for name, (is_file, at) in found.items()}


@pytest.mark.parametrize("arguments", EARLY, ids=" ".join)
def test_it_is_said_before_a_model_is_loaded(capsys, no_models, places, monkeypatch, arguments):
    monkeypatch.chdir(places["HOME"])
    before = tree(places["HOME"])
    real = [places.get(part, part.replace("HOME/", f"{places['HOME']}/")) for part in arguments]
    code, _, err = run(capsys, *real)
    assert code == 2
    assert err.startswith("spectrim: ")
    assert "Traceback" not in err
    assert tree(places["HOME"]) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what this machine has not")
def test_a_device_that_is_not_there_is_said(capsys, no_models):
    code, _, err = run(capsys, "evaluate", "demo", "--device", "cuda")
    assert (code, err) == (
        2,
        "spectrim: device 'cuda' is not there, this machine has none of the kind cuda; choose another, such as cpu",
    )


def test_the_library_says_it_as_early(no_models, places, tmp_path):
    stats = places["STATS"]
    for error, message, options in (
        (BudgetError, "a retention of 5 is impossible", {"retain": 5}),
        (BudgetError, "none.json", {"plan": tmp_path / "none.json"}),
        (SpectrimError, "FILE", {"retain": 0.5, "out": places["FILE"]}),
        (SpectrimError, "HELD", {"retain": 0.5, "out": places["HELD"], "overwrite": True}),
        (SampleError, "samples", {"retain": 0.5, "samples": 0}),
        (SampleError, "none.txt", {"retain": 0.5, "text": str(tmp_path / "none.txt")}),
        (UsageError, "samples", {"retain": 0.5, "recipe": "jw-svd", "stats": stats, "samples": 8}),
    ):
        with pytest.raises(error, match=message):
            spectrim.compress("demo", **options)
    with pytest.raises(TypeError, match="no argument 'sample'"):
        spectrim.compress("demo", retain=0.5, sample=8)
    with pytest.raises(UsageError, match="there is no kind of device 'foo'"):
        evaluate([resolve("demo")], device="foo")


def test_a_quantized_model_in_memory_is_refused(tmp_path):
    model = FAMILIES["llama"]()
    model.config.quantization_config = {"quant_method": "fp8"}
    for call in (
        lambda: spectrim.compress(model, recipe="svd", retain=0.5),
        lambda: spectrim.calibrate(model, tmp_path / "s", processor=None),
    ):
        with pytest.raises(SpectrimError, match="fp8"):
            call()
    assert not (tmp_path / "s").exists()


def test_usage_errors_of_the_parser_have_code_2(capsys):
    for arguments in (["compress"], ["fly"], ["calibrate", "demo"], ["evaluate", "demo", "--samples", "few"]):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert "Traceback" not in err
    assert cli.app.info.no_args_is_help


def test_what_only_the_model_can_say_is_said_before_samples_run(capsys, places, monkeypatch):
    def run_batch(*arguments, **options):
        raise AssertionError("samples ran")

    monkeypatch.setattr(sys.modules["spectrim.calibrate.run"], "run_batch", run_batch)
    home = Path(places["HOME"])
    row = {"rank": 2, "bytes": 1, "dense_bytes": 1}
    head = {"version": 1, "recipe": "spectrim", "retain": 0.5}
    name = "model.language_model.layers.0.mlp.gate_proj"
    (home / "FOREIGN.json").write_text(json.dumps({**head, "linears": {"layers.0.fc1": row}}))
    (home / "LARGE.json").write_text(json.dumps({**head, "linears": {name: {**row, "rank": 10**9}}}))
    for arguments, said in (
        (["--plan", f"{home}/FOREIGN.json"], "the model lacks"),
        (["--plan", f"{home}/LARGE.json"], "can have"),
        (["--retain", "1e-6"], "of the smallest options"),
        (["--retain", "0.1", "--set", "allocation.places=[connector]"], "linears stay dense (outside connector)"),
        (["--retain", "0.5", "--recipe", "asvd", "--set", "allocation.rule=sensitivity"], "measures text loss"),
    ):
        code, _, err = run(capsys, "compress", "demo", "-o", places["OUT"], *arguments)
        assert (code, said in err) == (2, True), err
    assert not Path(places["OUT"]).exists()
    assert not Path(f"{places['OUT']}.stats").exists()


def test_a_home_that_nobody_has_is_one_sentence(capsys, no_models):
    for arguments in (
        ["compress", "demo", "-o", "~nobody-has-it/x", "--retain", "0.5", "--recipe", "svd"],
        ["calibrate", "demo", "-o", "~nobody-has-it/x"],
        ["evaluate", "demo", "--json", "~nobody-has-it/x.json"],
        ["evaluate", "demo", "--questions", "~nobody-has-it/x.jsonl"],
        ["anatomy", "~nobody-has-it"],
        ["demo", "-o", "~nobody-has-it"],
    ):
        code, _, err = run(capsys, *arguments)
        assert (code, "is no user's home" in err) == (2, True), err


def test_a_name_that_is_too_long_is_one_sentence(no_models, tmp_path):
    with pytest.raises(UsageError, match=r"cannot be written .*too long.*; name another directory"):
        spectrim.compress("demo", tmp_path / ("a" * 300), retain=0.5, recipe="svd")


def test_options_read_a_tilde_as_home(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    arguments = ["--samples", "1", "--seqlen", "8", "--images", "none", "--no-curvature"]
    assert run(capsys, "calibrate", "demo", "--out=~/s", *arguments)[0] == 0
    assert run(capsys, "compress", "demo", "--out=~/c", "--stats=~/s", "--recipe=svd-llm", "--retain=.5")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "s"]


@pytest.mark.parametrize("content", ['{"a": 1}', "notes", "[]", '{"linears": {}, "version": 1}'])
def test_results_replace_no_other_file(capsys, no_models, tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    code, _, err = run(capsys, "evaluate", "demo", "--json", str(path))
    assert (code, "holds no results" in err) == (2, True), err
    assert path.read_text() == content


def test_results_replace_results_empty_files_and_no_devices(tmp_path):
    path = tmp_path / "results.json"
    for content in ("", '{"schema": 1, "date": "", "versions": {}, "results": []}'):
        path.write_text(content)
        check_file(path, "--json")
    with pytest.raises(UsageError, match="holds no results"):
        check_file(Path("/dev/null"), "--json")


def test_samples_for_a_recipe_that_reads_none_are_refused_by_the_library_too(no_models, tmp_path):
    with pytest.raises(UsageError, match="--seqlen has no effect with recipe 'svd', which reads no samples"):
        spectrim.compress("demo", tmp_path / "out", recipe="svd", retain=0.5, seqlen=64)
    assert not list(tmp_path.iterdir())
