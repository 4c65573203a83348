"""The plan: rank by linear, its bytes and its error; a JSON file that a person can read and edit."""

import json
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import PydanticKnownError

from spectrim.anatomy import Anatomy, Linear
from spectrim.errors import BudgetError
from spectrim.layers import Rank, head_ranks


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanRow(_Part):
    """One linear: its rank (None: dense; a list: one for each head of a q, k or v), and what follows from it.

    ``error`` is the relative error in the recipe's metric, Σ_{i>k} s_i / Σ s_i (None where no spectrum was made);
    ``metric`` says which samples the metric came from; ``loss`` is the increase of the model's loss, in nats, that is
    predicted of this row alone (None where nothing predicts it). All are notes: only ``rank`` is obeyed.
    """

    rank: Rank | None
    bytes: int
    dense_bytes: int
    error: float | None = None
    metric: str | None = None
    loss: float | None = None

    @field_validator("rank")
    @classmethod
    def _at_least_one(cls, rank: Rank | None) -> Rank | None:
        if rank is not None and min(head_ranks(rank), default=0) < 1:
            raise PydanticKnownError("greater_than_equal", {"ge": 1})
        return rank


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
    def loss(self) -> float | None:
        """Predicted increase of the loss, in nats: the sum over the rows that predict one; None if no row does."""
        losses = [row.loss for row in self.linears.values() if row.loss is not None]
        return sum(losses) if losses else None

    @property
    def ranks(self) -> dict[str, Rank]:
        """Ranks of the linears that are factored."""
        return {name: row.rank for name, row in self.linears.items() if row.rank is not None}

    def json(self) -> str:  # type: ignore[override]
        """The text of plan.json; ranks by head stand on one line."""
        text = json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
        return re.sub(r"\[\n[\d,\s]*\]", lambda ranks: json.dumps(json.loads(ranks[0])), text)

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
            if rank is not None:
                _check_rank(linear, rank, where)
            rows[name] = plan_row(linear, rank)  # the notes of a row may be those of another rank
        return Plan(recipe=self.recipe, retain=self.retain, linears=rows)


def plan_row(
    linear: Linear,
    rank: Rank | None,
    error: float | None = None,
    metric: str | None = None,
    *,
    loss: float | None = None,
) -> PlanRow:
    """The row of one linear, with its bytes."""
    size = linear.params
    if rank is not None:
        ranks = head_ranks(rank)  # each pays for the inputs, and for the outputs of its own head only
        size = sum(ranks) * (linear.in_features + linear.out_features // len(ranks))
    return PlanRow(
        rank=rank,
        bytes=size * linear.dtype.itemsize,
        dense_bytes=linear.nbytes,
        error=error,
        metric=metric,
        loss=loss,
    )


def _check_rank(linear: Linear, rank: Rank, where: str) -> None:
    ranks, width, whose = head_ranks(rank), linear.out_features, f"'{linear.name}'"
    if not isinstance(rank, int):
        if linear.role not in ("q", "k", "v") or not linear.heads:
            raise BudgetError(
                f"{where} gives '{linear.name}' ranks by head, which only a q, k or v projection of known heads can "
                "have; give it one rank, or null for dense"
            )
        if len(ranks) != linear.heads:
            raise BudgetError(
                f"{where} gives '{linear.name}' ranks for {len(ranks)} heads; it has {linear.heads}, each needs one"
            )
        width, whose = width // linear.heads, f"a head of {whose}"
    most = min(width, linear.in_features)
    if max(ranks) > most:
        raise BudgetError(f"{where} gives {whose} rank {max(ranks)}; it can have {most} at most, or null for dense")
