"""The plan: rank by linear, its bytes and its error; a JSON file that a person can read and edit."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spectrim.anatomy import Anatomy, Linear
from spectrim.errors import BudgetError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanRow(_Part):
    """One linear: its rank (None: dense), and what follows from it.

    ``error`` is the relative error in the recipe's metric, Σ_{i>k} s_i / Σ s_i (None where no spectrum was made);
    ``metric`` says which samples the metric came from. Both are notes: only ``rank`` is obeyed.
    """

    rank: int | None = Field(ge=1)
    bytes: int
    dense_bytes: int
    error: float | None = None
    metric: str | None = None


class Plan(_Part):
    """A whole plan; rows by runtime name, as `spectrim anatomy` prints them."""

    version: Literal[1] = 1
    recipe: str
    retain: float | None = None
    linears: dict[str, PlanRow]

    @property
    def bytes(self) -> int:
        """Stored bytes of the compressible linears, biases not counted."""
        return sum(row.bytes for row in self.linears.values())

    @property
    def dense_bytes(self) -> int:
        """The same before compression."""
        return sum(row.dense_bytes for row in self.linears.values())

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of the linears that are factored."""
        return {name: row.rank for name, row in self.linears.items() if row.rank is not None}

    def json(self) -> str:  # type: ignore[override]
        """The text of plan.json."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @classmethod
    def read(cls, path: str | Path, parts: Anatomy) -> "Plan":
        """A plan from its file, checked against the model that it is for; bytes are counted anew from the ranks.

        Raises:
            BudgetError: the file cannot be read, is no plan, or does not fit the model; names the linear.
        """
        try:
            plan = cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            detail: object = error
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                detail = ": ".join([*map(str, first["loc"]), first["msg"]])
            raise BudgetError(
                f"{path} is no plan that can be read ({detail}); write one with spectrim compress"
            ) from error
        return plan.fitted(parts, str(path))

    def fitted(self, parts: Anatomy, where: str = "the plan") -> "Plan":
        """This plan with a row for every linear of the model, in its order, and bytes counted from the ranks.

        Raises:
            BudgetError: it does not fit the model; names the linear.
        """
        known = {linear.name: linear for linear in parts.linears}
        if strange := sorted(self.linears.keys() - known.keys()):
            raise BudgetError(f"{where} plans for '{strange[0]}', which the model lacks; use a plan of this model")
        rows = {}
        for name, linear in known.items():
            row = self.linears.get(name)
            rank = None if row is None else row.rank
            most = min(linear.out_features, linear.in_features)
            if rank is not None and rank > most:
                raise BudgetError(f"{where} gives '{name}' rank {rank}; it can have {most} at most, or null for dense")
            rows[name] = plan_row(linear, rank)  # the notes of a row may be those of another rank
        return Plan(recipe=self.recipe, retain=self.retain, linears=rows)


def plan_row(linear: Linear, rank: int | None, error: float | None = None, metric: str | None = None) -> PlanRow:
    """The row of one linear, with its bytes."""
    size = linear.params if rank is None else rank * (linear.out_features + linear.in_features)
    return PlanRow(rank=rank, bytes=size * linear.dtype.itemsize, dense_bytes=linear.nbytes, error=error, metric=metric)
