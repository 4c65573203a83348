"""Estimates are sums that can be done by hand."""

import pytest

from spectrim.estimate import (
    WRITE,
    Checkpoints,
    Cost,
    Estimate,
    Rates,
    Unit,
    amount,
    by_work,
    calibration,
    compared,
    compression,
    duration,
    work,
)


def test_a_calibration_takes_its_samples_and_the_writing_of_its_sums():
    units = [Unit(10, 0.5, 1000, 700), Unit(4, 2.0, 3000, 900)]
    found = calibration(units, held=10**6, work=500)
    assert found.seconds == pytest.approx(10 * 0.5 + 4 * 2.0 + 1600 / WRITE)
    assert (found.memory, found.disk) == (10**6 + 500 + 3000, 1600)  # one unit's sums at a time
    assert calibration(units, held=0, work=0, processes=2).seconds == pytest.approx(6.5 + 1600 / WRITE)
    assert calibration([], held=7, work=0) == Estimate(0.0, 7, 0)


def test_linears_that_were_not_measured_are_in_proportion_to_the_nearest():
    shapes = {"small": (8, 8), "wide": (8, 16), "huge": (80, 80)}
    measured = {"small": Rates(1.0, 2.0, 3.0), "wide": Rates(10.0, 10.0, 10.0)}
    found = by_work(measured, shapes)
    assert {name: found[name] for name in measured} == measured
    factor = (2 * 80**3 + 80**3) / (8**3 + 16**3 + 8 * 16 * 8)
    assert found["huge"].decompose == pytest.approx(10 * factor)
    assert work((16, 16)) == 8 * work((8, 8))  # cubic
    with pytest.raises(ValueError, match="measured"):
        by_work({}, shapes)


def test_a_compression_counts_what_is_left_and_each_checkpoint():
    rates = {"a": Rates(1.0, 0.5, 2.0), "b": Rates(10.0, 1.0, 4.0)}
    job = Checkpoints({"a": 3, "b": 1}, {"a": 5, "b": 2}, {"a": 100, "b": 900}, 2, 5000, 700, compensates=True)
    found = compression(job, rates, walk=1.0, tune=0.5, held=10, work=20)
    disk = 3 * 100 + 900 + 5000 + 700
    walked = found.seconds - (3 * 1 + 10 + 5 * 0.5 + 2 * 1 + 2 * (5 * 2 + 2 * 4) + 2 * disk / WRITE)
    assert walked > 2.0  # two checkpoints, more than one pass each
    assert (found.memory, found.disk) == (30, disk)
    assert compression(job, rates, walk=1.0, tune=2.5, held=10, work=20).seconds == pytest.approx(found.seconds + 2 * 2)
    without = Checkpoints({}, {"a": 5, "b": 2}, {}, 2, 5000, 0, compensates=False)
    assert compression(without, rates, walk=9.0, tune=0.0, held=0, work=0).seconds == pytest.approx(
        40.5 + 2 * 5000 / WRITE
    )


def test_a_cost_is_what_was_taken_since_it_began():
    times, disk = iter([100.0, 130.0]), iter([50, 75])
    cost = Cost(Estimate(20.0, 5, 10), lambda: next(times), lambda: 9, lambda: next(disk))
    taken = cost.so_far(elsewhere=4)
    assert taken == Estimate(30.0, 9, 29)
    assert compared(cost.estimate, taken)["actual"] == {"seconds": 30.0, "memory": 9, "disk": 29}


def test_how_numbers_are_said():
    assert [amount(n) for n in (12, 1500, 187e6, 2.14e9)] == ["12 bytes", "1.5 kB", "187 MB", "2.1 GB"]
    assert [duration(n) for n in (0.2, 40, 99.4, 170, 9000)] == ["0 s", "40 s", "99 s", "3 minutes", "2.5 hours"]
    assert str(Estimate(40.0, 2**30 * 9 // 10, 120_000_000)) == "40 s, 0.9 GiB of memory, 120 MB on disk"
