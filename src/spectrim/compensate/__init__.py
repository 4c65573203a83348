"""Compensation: factors that answer to what the compressed layers before them do."""

from spectrim.compensate.run import Compensation

__all__ = ["Compensation"]
