"""How long a job will take, and how much memory and disk: from its shapes and the rates of this machine.

Functions of numbers alone; what measures the rates is beside what it measures (`calibrate/probe.py` and
`pipeline/probe.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

WRITE = 250e6  # bytes of tensors in a second that are hashed, written and synced, and read again
_WALK = 10.0  # forward passes that a batch of compensation takes: both models, sums, and blocks up to each group

Shape = tuple[int, int]  # outputs and inputs of a linear
_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Estimate:
    """What a job takes: wall-clock seconds, the peak of memory in bytes, and bytes that it writes to disk.

    Memory is that of the process, or of the accelerator where the model is on one.
    """

    seconds: float
    memory: int
    disk: int

    def __str__(self) -> str:
        return f"{duration(self.seconds)}, {self.memory / 2**30:.1f} GiB of memory, {amount(self.disk)} on disk"


@dataclass(frozen=True)
class Unit:
    """A part of a calibration: samples that are left, seconds for each, and bytes of its sums in memory and on disk."""

    samples: int
    seconds: float
    sums: int
    stored: int


def calibration(units: Sequence[Unit], *, held: int, work: int, processes: int = 1) -> Estimate:
    """What the units of a calibration take, one after the other.

    Args:
        units: all that are left.
        held: bytes that are held before, the model's and the libraries'.
        work: bytes that a batch takes besides, while it runs.
        processes: that share the samples.
    """
    disk = sum(unit.stored for unit in units)
    seconds = sum(unit.samples * unit.seconds for unit in units) / processes
    return Estimate(seconds + disk / WRITE, held + work + max((unit.sums for unit in units), default=0), disk)


@dataclass(frozen=True)
class Rates:
    """Seconds that one linear takes: to decompose, to list its options, and to make once."""

    decompose: float
    options: float
    make: float

    def times(self, factor: float) -> "Rates":
        """Those of a linear of `factor` times as much work."""
        return Rates(self.decompose * factor, self.options * factor, self.make * factor)


def work(shape: Shape) -> float:
    """What decomposing a linear costs, up to a factor: products and decompositions of both sides and of the weight."""
    out, size = shape
    return out**3 + size**3 + out * size * min(out, size)


def by_work(measured: Mapping[_Key, Rates], wanted: Mapping[_Key, Shape]) -> dict[_Key, Rates]:
    """The rates of all kinds of linears: measured, or those of the nearest measured one in proportion to the work.

    Raises ValueError where nothing was measured.
    """
    if not measured:
        raise ValueError("no linear was measured")

    def nearest(shape: Shape) -> _Key:
        return min(measured, key=lambda key: abs(work(wanted[key]) - work(shape)))

    found = {}
    for key, shape in wanted.items():
        like = nearest(shape)
        found[key] = measured[key] if key in measured else measured[like].times(work(shape) / work(wanted[like]))
    return found


@dataclass(frozen=True)
class Checkpoints:
    """What is left of a compression: linears by kind to decompose and to make, and what is written.

    ``decompose`` counts the linears without a spectrum, ``make`` those that may change, for each of `targets`
    checkpoints of ``bytes`` in all. ``spectra`` are the bytes that a decomposed linear of a kind takes on disk,
    ``kept`` those of compensated linears that stay beside the statistics.
    """

    decompose: Mapping[Any, int]
    make: Mapping[Any, int]
    spectra: Mapping[Any, int]
    targets: int
    bytes: int
    kept: int
    compensates: bool


def compression(
    job: Checkpoints, rates: Mapping[Any, Rates], *, walk: float, tune: float, held: int, work: int
) -> Estimate:
    """What decomposing, planning, making and writing take.

    Args:
        job: what is left to do.
        rates: by kind of linear.
        walk: seconds of one forward pass of all samples that compensation runs.
        tune: seconds of the end-to-end pass.
        held: bytes that are held before.
        work: bytes that the largest linear takes while it is decomposed or made, and the model as it is written.
    """
    seconds = sum(count * rates[kind].decompose for kind, count in job.decompose.items())
    seconds += sum(count * (rates[kind].options + job.targets * rates[kind].make) for kind, count in job.make.items())
    seconds += job.targets * walk * _WALK if job.compensates else 0.0
    seconds += job.targets * tune
    spectra = sum(count * job.spectra[kind] for kind, count in job.decompose.items())
    disk = spectra + job.kept + job.bytes
    return Estimate(seconds + 2 * disk / WRITE, held + work, disk)


class Cost:
    """An estimate, and what it comes to from here on.

    Args:
        estimate: of the whole job.
        clock: gives seconds.
        peak: gives the most bytes of memory so far.
        disk: gives the bytes that lie where the job writes.
    """

    def __init__(
        self, estimate: Estimate, clock: Callable[[], float], peak: Callable[[], int], disk: Callable[[], int]
    ) -> None:
        self.estimate, self._clock, self._peak, self._disk = estimate, clock, peak, disk
        self._began, self._before = clock(), disk()

    def so_far(self, elsewhere: int = 0) -> Estimate:
        """What has been taken; `elsewhere` are bytes that were written in another place."""
        return Estimate(self._clock() - self._began, self._peak(), self._disk() - self._before + elsewhere)


def compared(estimate: Estimate, actual: Estimate) -> dict[str, dict[str, float]]:
    """Both, for a record."""
    return {"estimate": asdict(estimate), "actual": asdict(actual)}


def amount(nbytes: float) -> str:
    """Bytes as a person says them: 512 bytes, 120 MB, 2.1 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.{0 if nbytes >= 20 * size else 1}f} {unit}"
    return f"{nbytes:.0f} bytes"


def duration(seconds: float) -> str:
    """A time as a person says it: 40 s, 3 minutes, 2.5 hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 100 * 60 else f"{seconds / 3600:.1f} hours"
