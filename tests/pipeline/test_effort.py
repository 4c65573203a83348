"""What a level of effort sets, and that whoever says something else wins."""

import pytest

import spectrim
from spectrim.calibrate import Statistics
from spectrim.checkpoint import read_provenance
from spectrim.errors import UsageError
from spectrim.pipeline.jobs import with_effort
from spectrim.settings import CALIBRATION, EFFORTS

THOROUGH = {"compensate.samples": 128, "tune.epochs": 4, "tune.samples": 128}


@pytest.mark.parametrize(
    ("name", "recipe", "changes", "samples", "wanted"),
    [
        ("standard", "spectrim", {}, {}, ({}, {})),
        ("quick", "spectrim", {}, {}, ({"compensate.kind": "none"}, {"samples": 32})),
        ("quick", "spectrim", {}, {"samples": 7}, ({"compensate.kind": "none"}, {"samples": 7})),
        ("quick", "spectrim", {"compensate.samples": 9}, {}, ({"compensate.samples": 9}, {"samples": 32})),
        ("quick", "svd", {}, {}, ({}, {})),  # which reads none
        ("thorough", "laser", {"metric.eta": "token"}, {}, ({"metric.eta": "token"}, {"samples": 256})),
        ("thorough", "adasvd", {}, {}, ({"tune.epochs": 4, "tune.samples": 128}, {"samples": 256})),  # it has 256
        ("thorough", "spectrim", {"tune.epochs": 0}, {"samples": 9}, (THOROUGH | {"tune.epochs": 0}, {"samples": 9})),
    ],
)
def test_what_it_sets(name, recipe, changes, samples, wanted):
    assert with_effort(name, recipe, changes, samples, gathers=True) == wanted


@pytest.mark.parametrize(
    ("name", "recipe", "changes", "message"),
    [
        ("thorough", "laser", {}, "effort thorough leaves recipe 'laser' as it is, which does not compensate"),
        ("thorough", "spectrim", {"compensate.samples": 9}, "which has changes of compensation of its own"),
        ("quick", "laser", {}, ""),
        ("thorough", "spectrim", {"tune.epochs": 1}, ""),
    ],
)
def test_what_it_does_not_set_is_said(name, recipe, changes, message, caplog):
    with_effort(name, recipe, changes, {}, gathers=True)
    assert message in caplog.text if message else not caplog.text


def test_statistics_have_their_own_samples():
    assert with_effort("quick", "spectrim", {}, {}, gathers=False) == ({"compensate.kind": "none"}, {})


def test_the_standard_is_what_all_defaults_say():
    assert EFFORTS["standard"].samples == CALIBRATION.samples
    assert not EFFORTS["standard"].compensation


def test_the_library_and_the_record_follow(tmp_path):
    with pytest.raises(UsageError, match="no effort 'much'; choose from quick, standard, thorough"):
        spectrim.compress("demo", tmp_path / "x", retain=0.5, effort="much")
    options = {"effort": "quick", "seqlen": 8, "images": None}
    spectrim.compress("demo", tmp_path / "out", retain=0.5, **options)
    record = read_provenance(tmp_path / "out")
    assert (record["calibration"]["samples"], record["recipe"]["compensate"]["kind"]) == (32, "none")
    assert Statistics.open(tmp_path / "out.stats").manifest.settings.samples == 32
    assert "cost" not in record  # nobody asked
