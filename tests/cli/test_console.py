"""What a verb says: lines a minute in a log, results that nothing folds, JSON alone on standard output."""

import json
import logging
import re
import sys
from io import StringIO

import pytest

from helpers.command import run
from spectrim.cli import main
from spectrim.cli.console import Pace, progress, show, speaking
from spectrim.recipe import builtin_names
from spectrim.settings import RunOptions

TINY = ["--samples", "2", "--seqlen", "8", "--images", "none", "--no-curvature"]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_a_line_a_minute_says_what_is_done_and_what_is_left():
    said, clock = [], Clock()
    pace = Pace(said.append, clock)
    for done in range(129):
        pace("calibrate", done, 128)
        clock.now += 3.5
    assert said[0] == "calibrate: 18 of 128 samples, about 6 minutes left"  # 63 s for 18: 385 s for 110
    assert said[1] == "calibrate: 36 of 128 samples, about 5 minutes left"
    assert said[-1] == "calibrate: all 128 samples done after 7 minutes"
    assert len(said) == 128 // 18 + 1


def test_time_left_counts_from_where_a_run_was_resumed_and_stages_begin_anew():
    said, clock = [], Clock()
    pace = Pace(said.append, clock)
    pace("calibrate", 64, 128)
    clock.now += 61
    pace("calibrate", 65, 128)
    assert said == ["calibrate: 65 of 128 samples, about 64 minutes left"]
    clock.now += 5
    pace("compensate", 1, 30)  # a stage that first speaks when one is done began when the one before ended
    clock.now += 60
    pace("compensate", 2, 30)
    assert said[1] == "compensate: 2 of 30 blocks, about 15 minutes left"
    pace("options", 0, 10)
    pace("options", 10, 10)
    assert said[2] == "options: all 10 linears done after 0 s"
    pace("decompose", 10, 10)  # complete already
    assert len(said) == 3


def test_bars_are_for_terminals_and_a_log_file_has_lines_in_either_case(monkeypatch, tmp_path):
    class Terminal(StringIO):
        def isatty(self):
            return True

    for stream, lines in ((Terminal(), False), (StringIO(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        log = tmp_path / f"{lines}.log"
        with speaking(RunOptions(log_file=log), json_out=False), progress() as report:
            report("decompose", 0, 3)
            report("decompose", 3, 3)
        assert ("decompose: all 3 linears done" in stream.getvalue()) is lines
        assert "decompose: all 3 linears done" in log.read_text()


def test_quiet_leaves_errors_and_results_and_a_log_file_has_everything(capsys, tmp_path):
    log = tmp_path / "run.log"
    calibrate = ["calibrate", "demo", "-o", tmp_path / "s", *TINY]
    code, out, err = run(capsys, *calibrate, "--quiet", "--log-file", log)
    assert (code, err) == (0, "")
    assert "moments of 2 text samples" in out
    first = log.read_text()
    for words in ("calibrate: will take about", "calibrate: all 2 samples done", "calibrate: took", out):
        assert words in first
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [A-Z]+ ", line) for line in first.splitlines())
    code, _, err = run(capsys, *calibrate, "--log-file", log)
    assert (code, "calibrate: complete already, in" in err) == (0, True)
    assert log.read_text().startswith(first)
    code, _, err = run(
        capsys, "calibrate", "demo", "-o", tmp_path / "s", "--samples", "0", "--quiet", "--log-file", log
    )
    assert code == 2
    assert err in " ".join(log.read_text().replace("ERROR ", "spectrim: ").split())
    assert not logging.getLogger("spectrim").handlers


def test_verbose_says_what_is_for_debugging(capsys):
    for options, shown in ((RunOptions(verbose=True), True), (RunOptions(), False)):
        with speaking(options, json_out=False):
            logging.getLogger("spectrim.anything").debug("a detail")
            logging.getLogger("spectrim.anything").info("a fact")
        err = capsys.readouterr().err
        assert ("a detail" in err, "a fact" in err) == (shown, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quiet", "--verbose"], "--quiet and --verbose contradict each other; leave one out"),
        (["--log-file", "NOWHERE/x.log"], "cannot be written"),
    ],
)
def test_contradictions_are_mistakes(capsys, tmp_path, arguments, message):
    arguments = [part.replace("NOWHERE", str(tmp_path / "none")) for part in arguments]
    code, _, err = run(capsys, "calibrate", "demo", "-o", tmp_path / "s", *TINY, *arguments)
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "s").exists()


def test_lines_of_a_table_are_never_folded_in_a_pipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "argv", ["spectrim", "recipes"])
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(builtin_names())
    assert not any(line.endswith(" ") for line in lines)


def test_standard_output_has_json_alone(capsys):
    code, out, err = run(capsys, "recipes", "--json", "-")
    assert code == 0
    assert "what it does" in err  # the table
    recipes = json.loads(out)["recipes"]
    assert [recipe["name"] for recipe in recipes] == list(builtin_names())
    assert recipes[0].keys() >= {"metric", "allocation", "summary"}
    code, out, _ = run(capsys, "anatomy", "demo", "--json", "-", "--quiet")
    found = json.loads(out)
    assert found["tower"] == "model.vision_tower"
    assert sum(group["count"] for group in found["groups"]) == len(found["linears"]) == 68


def test_json_files_are_replaced_where_they_are_results_alone(capsys, tmp_path):
    path = tmp_path / "recipes.json"
    for _ in range(2):
        assert run(capsys, "recipes", "--json", path)[0] == 0
    assert json.loads(path.read_text()).keys() == {"date", "versions", "recipes"}
    path.write_text('{"mine": 1}')
    code, _, err = run(capsys, "recipes", "--json", path)
    assert (code, "holds no results" in err) == (2, True)
    assert path.read_text() == '{"mine": 1}'


def test_results_go_to_standard_error_beside_json(capsys):
    with speaking(RunOptions(), json_out=True):
        show("a result")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "a result\n")
