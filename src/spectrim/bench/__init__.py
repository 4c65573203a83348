"""What a model costs to run: latencies, memory and bytes, of several models side by side."""

from spectrim.bench.engines import ENGINES
from spectrim.bench.measure import Benchmark, bench

__all__ = ["ENGINES", "Benchmark", "bench"]
