"""Runs samples through a model and keeps the moments of what its linears read, and of their output gradients."""

from spectrim.calibrate.moments import GradMoment, Moment, OutputMoment
from spectrim.calibrate.run import calibrate
from spectrim.calibrate.statistics import Statistics

__all__ = ["GradMoment", "Moment", "OutputMoment", "Statistics", "calibrate"]
