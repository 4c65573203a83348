"""The forms in which a linear can be stored: one file each, all of one protocol (:mod:`spectrim.storage.base`)."""

from spectrim.storage import (  # noqa: F401 - registers
    dense,
    embedding,
    integer_factors,
    integers,
    integers_and_factors,
    low_rank,
    narrow,
)
from spectrim.storage.base import (
    DENSE,
    Form,
    Options,
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
from spectrim.storage.embedding import share, unshare
from spectrim.storage.problem import Problem

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
    "share",
    "stored_layers",
    "unshare",
]
