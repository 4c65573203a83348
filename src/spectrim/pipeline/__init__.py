"""The stages in order: what a job is (`jobs`), the stages of one model (`stages`), and the entry points (`run`)."""

from spectrim.pipeline.run import compress, compression, job_compression

__all__ = ["compress", "compression", "job_compression"]
