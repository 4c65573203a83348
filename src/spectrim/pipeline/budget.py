"""How large a checkpoint may be, in the ways that a user may say it."""

import math
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.checkpoint.size import Stored, file_bytes, saved_tensors
from spectrim.checks import check_retain
from spectrim.errors import BudgetError
from spectrim.pipeline.context import CacheBytes, Context
from spectrim.plan.plan import Plan
from spectrim.settings import UNITS, read_bytes
from spectrim.storage import DENSE
from spectrim.storage.base import tensors_of


@dataclass(frozen=True)
class Budget:
    """One limit: `retain`, the share of the linears' dense bytes; `bits`, per weight of the linears; or `size`.

    `size` is as a user writes it, such as 3.5GB (10⁹ bytes) or 3.5GiB (2³⁰ bytes): of all safetensors files together,
    with everything that is in them; and with the key/value cache of a `context`, where there is one.

    Raises BudgetError for what is no limit, and unless exactly one is given.
    """

    retain: float | None = None
    bits: float | None = None
    size: str | int | None = None
    context: Context | None = None

    def __post_init__(self) -> None:
        if self.context is not None and self.size is None:
            raise BudgetError(
                "a cache is counted in a size alone; give --size beside --context, or leave out --context"
            )
        if sum(limit is not None for limit in (self.retain, self.bits, self.size)) != 1:
            raise BudgetError(
                "give one limit: a size, such as --size 3.5GB; bits per weight, such as --bits 3.2; or a share of the "
                "linears' bytes, such as --retain 0.6"
            )
        if self.retain is not None:
            check_retain(self.retain)
        if self.bits is not None and not 0 < self.bits <= 64:
            raise BudgetError(f"{self.bits} bits per weight are impossible; give a number such as 3.2")
        if self.size is not None and self.size_bytes < 1:
            raise BudgetError(f"a size of {self.size} is impossible; write it as 3.5GB, 900MB or 2GiB")

    @cached_property
    def _read(self) -> tuple[float, str]:
        """Number and unit of the size. Raises BudgetError for what is none."""
        try:
            return read_bytes(str(self.size))
        except ValueError as error:
            raise BudgetError(f"{self.size!r} {error}") from error

    @property
    def size_bytes(self) -> int:
        """Bytes of the size."""
        number, unit = self._read
        return int(number * UNITS[unit])

    @property
    def unit(self) -> str:
        """In which the size was written."""
        return self._read[1]

    @property
    def label(self) -> str:
        """A name for files, such as ``retain-0.6`` or ``size-3.5GB``."""
        for name, value in (("retain", self.retain), ("bits", self.bits), ("size", self.size)):
            if value is not None:
                more = "" if self.context is None else f"-context-{self.context.tokens}x{self.context.batch}"
                return f"{name}-{str(value).replace(' ', '')}{more}"
        raise AssertionError

    def linear_bytes(self, sizes: "Sizes") -> int:
        """Bytes that the linears of a model may take together, and the cache where it is counted.

        Raises BudgetError where all of it is small enough already.
        """
        if self.retain is not None:
            return int(self.retain * sizes.linears)
        if self.bits is not None:
            return min(sizes.linears, int(self.bits * sizes.params / 8))
        if self.size_bytes >= (whole := self.whole(sizes)):
            beside = "" if self.context is None else f" with a cache of {self.context}"
            raise BudgetError(
                f"the dense model{beside} takes {written(whole, self.unit)}, no more than {self.size}; use it as it "
                "is, or give a smaller size"
            )
        return self.size_bytes - sizes.fixed

    def whole(self, sizes: "Sizes") -> int:
        """What the dense model takes of a size: with the cache where it is counted."""
        return sizes.dense + sizes.cache(self).dense if self.context is not None else sizes.dense

    def remedy(self, sizes: "Sizes", missing: int) -> str:
        """What to ask for in place of a limit that so many bytes are missing of."""
        if self.retain is not None:
            return f"raise --retain to {math.ceil(1e4 * (self.retain + missing / sizes.linears)) / 1e4:g}"
        if self.bits is not None:
            return f"raise --bits to {math.ceil(1e3 * (self.bits + 8 * missing / sizes.params)) / 1e3:g}"
        return f"give at least {written(self.size_bytes + missing, self.unit)}"


class Sizes:
    """Bytes of the safetensors files of one model under any plan.

    ``dense`` as it is, ``fixed`` without the weights of its ``linears``, of which there are ``params``.
    """

    def __init__(self, model: PreTrainedModel, parts: Anatomy) -> None:
        self._model = model
        self._tensors: dict[str, Stored] = saved_tensors(model)
        self._parts = parts
        self.dense = file_bytes(self._tensors.values())
        self.linears = sum(linear.nbytes for linear in parts.linears)
        self.params = sum(linear.params for linear in parts.linears)
        self.fixed = self.dense - self.linears

    def of(self, plan: Plan) -> int:
        """Of a checkpoint that is made as a plan says; never less than what is written."""
        tensors = dict(self._tensors)
        for linear in (*self._parts.linears, *self._parts.tables):
            row = plan.rows.get(linear.name)
            if row is None or row.form == DENSE:
                continue
            tensors[f"{linear.name}.weight"] = (f"{linear.name}.weight", linear.dtype, (0,))
            stored = tensors_of(row.form, linear.in_features, linear.out_features, row.spec, linear.dtype)
            tensors |= {f"{linear.name}.{key}": (f"{linear.name}.{key}", x.dtype, x.shape) for key, x in stored.items()}
        return file_bytes(tensors.values())

    def cache(self, budget: Budget) -> CacheBytes:
        """Bytes of the cache that a budget counts. Raises BudgetError where they are not known."""
        assert budget.context is not None
        return CacheBytes(self._model, self._parts, budget.context)

    def counted(self, plan: Plan, budget: Budget) -> int:
        """What a budget's size counts: the files, and the cache of its context."""
        return self.of(plan) + (0 if budget.context is None else self.cache(budget).under(plan))


def written(size: int, unit: str) -> str:
    """Bytes in a unit, rounded up, so that a limit that is written so holds them."""
    if UNITS[unit] == 1:
        return f"{size}{unit or ' bytes'}"
    return f"{-(-size * 1000 // UNITS[unit]) / 1000:g}{unit}"
