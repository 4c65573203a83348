"""What a model costs to run: latencies, memory and bytes, of several models side by side."""

from spectrim.bench.engines import ENGINES
from spectrim.bench.frontier import Attempt, Frontier
from spectrim.bench.measure import Benchmark, bench

__all__ = ["ENGINES", "Attempt", "Benchmark", "Frontier", "bench"]
