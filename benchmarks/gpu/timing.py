"""What the benchmarks of this folder share: a clock that works with and without a GPU, and rows of a table."""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

BANDWIDTH = 3.0e12  # bytes per second: what an H100 (3.35) or H200 (4.8) is held against
ROTATED = 256e6  # bytes of weights that are read in turn, some times the 50 MB of cache of either


@dataclass(frozen=True)
class Clock:
    """Times calls: replays of a CUDA graph on a GPU, plain calls on a CPU."""

    device: torch.device
    repeats: int = 7

    @classmethod
    def here(cls, small: bool) -> "Clock":
        """On the GPU, or with `small` on the CPU. Exits where there is no GPU."""
        if small:
            return cls(torch.device("cpu"), repeats=2)
        if not torch.cuda.is_available():
            raise SystemExit("there is no GPU here; --small runs a small form on the CPU")
        return cls(torch.device("cuda"))

    @property
    def name(self) -> str:
        """Of the device."""
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU, a small form that says nothing"

    @property
    def processors(self) -> int:
        """Multiprocessors of the device."""
        return torch.cuda.get_device_properties(0).multi_processor_count if self.device.type == "cuda" else 1

    def seconds(self, run: Callable[[], object]) -> float:
        """Median of one call, after calls that warm up."""
        if self.device.type == "cpu":
            run()
            return statistics.median(self._timed(run) for _ in range(self.repeats))
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # compiles kernels and fills caches, off the stream of the graph
            run()
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        times = []
        for _ in range(self.repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    @staticmethod
    def _timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def asked(
    about: str | None, small: str, arguments: list[str] | None, **flags: str
) -> tuple[argparse.Namespace, Callable[[], float]]:
    """The options that every benchmark here has, and its own flags with their help, and the seconds since it began.

    `about` is its docstring, `small` the help of ``--small``.
    """
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help=small)
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    parser.add_argument("--limit", type=float, default=225, help="seconds after which nothing new begins")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args(arguments), lambda: time.monotonic() - began


def nbytes(layer: nn.Module) -> int:
    """Bytes that a file has of it, which are those that a product has to read."""
    return sum(tensor.nbytes for tensor in layer.state_dict().values())


def rotated(layer: nn.Module, room: float) -> list[nn.Module]:
    """The layer and as many copies as fill the room, two at least: their weights are out of the cache when read."""
    return [layer, *(copy.deepcopy(layer) for _ in range(max(1, min(511, int(room / nbytes(layer))))))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def verdict(what: str, found: float | None, wanted: float) -> str:
    """A line that says whether a factor is reached."""
    if found is None:
        return f"not measured: {what} at least {wanted} times"
    return f"{'PASS' if found >= wanted else 'FAIL'}: {what} {found:.2f} times, wanted at least {wanted}"
