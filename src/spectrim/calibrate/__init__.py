"""Runs samples through a model and keeps the moments of what its linears read."""

from spectrim.calibrate.moments import GradMoment, Moment
from spectrim.calibrate.run import calibrate
from spectrim.calibrate.statistics import Statistics

__all__ = ["GradMoment", "Moment", "Statistics", "calibrate"]
