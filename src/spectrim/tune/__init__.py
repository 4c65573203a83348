"""The end-to-end pass: what a compressed model stores as floats, trained towards the dense model's predictions."""

from spectrim.tune.run import Tuned, Tuning, beside

__all__ = ["Tuned", "Tuning", "beside"]
