"""One page that shows results: what models can do and cost, how they are stored, and what they answer."""

from spectrim.report.writing import report

__all__ = ["report"]
