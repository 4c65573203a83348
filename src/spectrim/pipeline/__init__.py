"""The stages in order: what a job is (`jobs`), the stages of one model (`stages`), and the entry points (`run`).

`trials` runs several jobs and measures what they make.
"""

from spectrim.pipeline.run import compress, compression, job_compression
from spectrim.pipeline.trials import pareto

__all__ = ["compress", "compression", "job_compression", "pareto"]
