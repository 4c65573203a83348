"""Compensation: factors that answer to what the compressed layers before them do."""

from spectrim.compensate.run import Anchored

__all__ = ["Anchored"]
