"""The forms in which a linear can be stored: one file each, all of one protocol (:mod:`spectrim.storage.base`)."""

from spectrim.storage import dense, integer_factors, integers, integers_and_factors, low_rank  # noqa: F401 - registers
from spectrim.storage.base import (
    DENSE,
    Form,
    Options,
    Problem,
    Spec,
    StoredLayer,
    Tensors,
    exchange,
    filled,
    form,
    forms,
    made,
    register,
    stored_layers,
)

__all__ = [
    "DENSE",
    "Form",
    "Options",
    "Problem",
    "Spec",
    "StoredLayer",
    "Tensors",
    "exchange",
    "filled",
    "form",
    "forms",
    "made",
    "register",
    "stored_layers",
]
