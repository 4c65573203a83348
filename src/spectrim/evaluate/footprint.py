"""What a model costs: stored bytes of a checkpoint, peak memory of a process."""

import gc
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from spectrim.calibrate.probe import forget_resident_peak, resident
from spectrim.checkpoint.weights import weight_files
from spectrim.errors import CheckpointError, ModelError


@dataclass(frozen=True)
class Memory:
    """Bytes; None where the platform cannot tell.

    `start_rss` is the resident memory of the process before the model was loaded (Python, libraries, samples) and
    `peak_rss` the highest afterwards, weights mapped from disk included; `peak_cuda` is the highest allocation of any
    one CUDA device.
    """

    start_rss: int | None
    peak_rss: int | None
    peak_cuda: int | None


class PeakMemory:
    """Measures a block of code: `with PeakMemory() as meter: …`, then `meter.memory`.

    Linux keeps one high-water mark per process; it is reset on entry, so that models evaluated one after the other do
    not inherit each other's peak. Where it cannot be reset, resident memory is reported as None rather than too high.
    """

    memory: Memory

    def __enter__(self) -> Self:
        gc.collect()
        self._start = resident("VmRSS") if forget_resident_peak() else None
        self._devices = range(torch.cuda.device_count())
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        peak = None if self._start is None else resident("VmHWM")
        cuda = max((torch.cuda.max_memory_allocated(device) for device in self._devices), default=None)
        self.memory = Memory(self._start, peak, cuda)


def stored_bytes(directory: Path) -> int:
    """Bytes of the safetensors files that hold the model, headers included; only files that its index names.

    Raises:
        CheckpointError: when the directory holds no safetensors model, or a shard that the index names is missing.
    """
    try:
        files = weight_files(directory)
    except ModelError as error:
        raise CheckpointError(str(error)) from error
    if files[0].suffix != ".safetensors":
        raise CheckpointError(f"{directory} lacks model.safetensors; save the model as safetensors")
    return sum(file.stat().st_size for file in files)
