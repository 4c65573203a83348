"""One record of options for the library and the command line: names, defaults, limits, and options without effect."""

import math
from inspect import signature

import pytest
import typer

from spectrim.calibrate import calibrate
from spectrim.cli import app
from spectrim.cli.verbs import _value
from spectrim.errors import SampleError, UsageError
from spectrim.evaluate import evaluate
from spectrim.pipeline import compress, compression
from spectrim.settings import CalibrationOptions, EvaluationOptions, RunOptions

COMMANDS = typer.main.get_command(app).commands
RUN = {"device", "dtype", "trust_remote_code", "help", "json", "dry_run", *RunOptions.model_fields}  # of a run
CALIBRATE = ("model", "out", "processor", "progress", "estimate")  # arguments of the library alone
OWN = {  # of compress, in both
    "recipe", "retain", "bits", "size", "context", "batch", "plan", "stats", "changes", "keep", "only", "effort",
    "overwrite", "trust_remote_code",
}  # fmt: skip


def library(function, *apart):
    """Names and defaults of a function's arguments, but for those that the command line has in another way."""
    return {name: p.default for name, p in signature(function).parameters.items() if name not in apart}


def command_line(verb, record):
    """The same of a verb's options."""
    found = {p.name: p.default for p in COMMANDS[verb].params}
    return {
        name: _value(record, name, value) if name in record.model_fields else value for name, value in found.items()
    }


@pytest.mark.parametrize(
    ("record", "function", "apart", "verb", "more"),
    [
        (CalibrationOptions, calibrate, CALIBRATE, "calibrate", {"model", "out", "effort"}),
        (CalibrationOptions, calibrate, CALIBRATE, "compress", {"model", "out", *OWN}),
        (
            EvaluationOptions, evaluate, ("directories", "device", "dtype", "trust_remote_code", "progress"),
            "evaluate", {"models", "suite", "limit", "card"},
        ),
    ],
)  # fmt: skip
def test_both_surfaces_have_the_options_of_the_record(record, function, apart, verb, more):
    options = dict(record())
    assert library(function, *apart) == options
    found = command_line(verb, record)
    assert found.keys() - more - RUN == options.keys()
    assert {name: found[name] for name in options} == options


def test_compress_has_the_same_options_of_its_own():
    found = library(compress, "model", "out", "processor", "progress", "calibration")
    assert found.keys() == OWN
    there = command_line("compress", CalibrationOptions)
    for name, default in found.items():
        assert there[name] == default or (not there[name] and not default), name
    shared = library(compression, "model", "processor", "progress", "calibration", "keep", "check", "foresee")
    assert shared.items() <= found.items()


@pytest.mark.parametrize(
    ("record", "values", "message"),
    [
        (CalibrationOptions, {"samples": 0}, "samples must be at least 1, not 0"),
        (CalibrationOptions, {"seed": -1}, "seed must be at least 0, not -1"),
        (CalibrationOptions, {"seed": 2**70}, "seed must be less than"),
        (CalibrationOptions, {"memory": "0GiB"}, "memory '0GiB' is too little; write it as 20GiB"),
        (CalibrationOptions, {"memory": "9" * 400}, "is no size; write it as 3.5GB"),
        (CalibrationOptions, {"memory": "20 apples"}, "memory '20 apples' is no size; write it as 3.5GB"),
        (CalibrationOptions, {"answer_tokens": 0}, "at least 1"),
        (CalibrationOptions, {"checkpoint_seconds": math.nan}, "checkpoint_seconds cannot be nan"),
        (CalibrationOptions, {"labels": "mine"}, "labels cannot be 'mine'"),
        (CalibrationOptions, {"text": ""}, "text cannot be ''"),
        (EvaluationOptions, {"stride": 0}, "stride must be at least 1"),
        (EvaluationOptions, {"max_tokens": -3}, "max_tokens must be at least 1"),
        (EvaluationOptions, {"batch_size": 0}, "batch_size must be at least 1"),
        (EvaluationOptions, {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_limits_are_said_in_a_sentence(record, values, message):
    with pytest.raises(SampleError, match=message):
        record.checked(**values)


@pytest.mark.parametrize(
    ("record", "values", "idle"),
    [
        (CalibrationOptions, {"text": None, "seqlen": 64}, "--seqlen has no effect without text"),
        (CalibrationOptions, {"images": None, "instruction": "Look."}, "--instruction has no effect without images"),
        (CalibrationOptions, {"curvature": False, "labels": "given"}, "--labels has no effect without gradients"),
        (CalibrationOptions, {"curvature": False, "curvature_forms": {"q": "full"}}, "--curvature-form has no effect"),
        (CalibrationOptions, {"images": None, "answer_tokens": 4}, "--answer-tokens has no effect"),
        (CalibrationOptions, {"curvature": False, "gradients": True, "labels": "given"}, None),
        (EvaluationOptions, {"tasks": ("vqa",), "stride": 8}, "--stride has no effect without the task perplexity"),
        (EvaluationOptions, {"tasks": ("perplexity",), "questions": "builtin"}, "--questions has no effect without"),
        (EvaluationOptions, {"tasks": ("perplexity",), "stride": 8}, None),
    ],
)
def test_options_without_effect_are_named(record, values, idle):
    options = record.checked(**values)
    if idle is None:
        options.check_effect(values)
        return
    with pytest.raises(UsageError, match=idle):
        options.check_effect(values)
    options.check_effect([])  # a default is no wish


@pytest.mark.parametrize(
    ("tasks", "message"),
    [((), "no evaluation task"), (("",), "no evaluation task ''"), (("vqa", "vqa"), "'vqa' is named twice")],
)
def test_tasks_are_checked(tasks, message):
    with pytest.raises(SampleError, match=message):
        EvaluationOptions.checked(tasks=tasks).check_together()


def test_a_stride_is_no_longer_than_its_window():
    with pytest.raises(SampleError, match="stride is 9 and seqlen is 8"):
        EvaluationOptions.checked(stride=9, seqlen=8).check_together()
