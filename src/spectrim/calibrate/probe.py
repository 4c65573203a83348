"""What a calibration will take on this machine: a few of its steps are run and timed, and their sums thrown away."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import torch

from spectrim.calibrate.distributed import share
from spectrim.calibrate.manifest import CalibrationUnit, Manifest
from spectrim.calibrate.moments import Sums
from spectrim.estimate import Estimate, Unit, calibration
from spectrim.samples import Modality

_SECONDS = 0.7  # of steps that are timed for each unit
_WARM = 5.0  # seconds up to which a first step only warms up: it touches the memory of the sums and checks the model


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held since `forget_peak`; on a CUDA device, those allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (found := resident("VmHWM")) is not None:
        return found
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew from here; without effect where the system has no way to."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    forget_resident_peak()


def held_memory(device: torch.device) -> int:
    """The bytes that this process holds now, as far as the system says; else as `peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    found = resident("VmRSS")
    return peak_memory(device) if found is None else found


def resident(field: str) -> int | None:
    """Bytes of this process by Linux: ``VmRSS`` now, ``VmHWM`` the most so far; None on other systems."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def forget_resident_peak() -> bool:
    """Let ``VmHWM`` begin anew from here; returns whether the system could."""
    with suppress(OSError):  # not Linux, or a sandbox without this file
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def written_bytes(directory: Path) -> int:
    """Bytes of all files below a directory; 0 where there is none."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def foresee(
    manifest: Manifest,
    samples: Mapping[Modality, int],
    device: torch.device,
    steps: Callable[[CalibrationUnit, Sums], Iterator[None]],
    sizes: Callable[[CalibrationUnit], tuple[int, int]],
) -> Estimate:
    """What is left of a calibration.

    Args:
        manifest: how far it is.
        samples: of each modality.
        device: of the model.
        steps: runs a unit's batches into sums, and yields after each.
        sizes: bytes of a unit's sums in memory and on disk.
    """
    forget_peak(device)
    before, units, kept = held_memory(device), list[Unit](), 0
    for _, same in groupby(manifest.units, key=lambda unit: unit.kind):
        several = [*same]
        # One stands for all of its kind: passes for inputs end behind their linears, half of all on average; gradient
        # passes begin with the last linears, and no other takes more.
        sums, tried = Sums(torch.device("cpu")), several[-1] if several[0].gradients else several[len(several) // 2]
        began = time.monotonic()
        first, counted = 0, 0
        for number, _ in enumerate(steps(tried, sums)):
            took = time.monotonic() - began
            if number == 0 and took < _WARM:
                began, first = time.monotonic(), sums.samples
                continue
            counted = sums.samples - first
            if took >= _SECONDS:
                break
        seconds = (time.monotonic() - began) / max(counted or sums.samples, 1)
        kept = max(kept, sums_bytes(sums))
        for unit in several:
            left = samples[unit.modality] - manifest.gathered[unit.name].samples
            units.append(Unit(left, seconds, *sizes(unit)))
        del sums
    work = max(0, peak_memory(device) - before - kept)
    return calibration(units, held=before, work=work, processes=share()[1])


def sums_bytes(sums: Sums) -> int:
    """Bytes of all tensors of one unit's sums."""
    held = [x for one in sums.moments.values() for x in (one.gram, one.abs_sum)]
    held += [x for one in sums.outputs.values() for x in (*one.held.values(), one.traces)]
    return sum(x.nbytes for x in (*held, *sums.fisher.values()))
