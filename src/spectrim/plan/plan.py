"""The plan: rank by linear, its bytes and its error; a JSON file that a person can read and edit."""

import json
import logging
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticKnownError

from spectrim.anatomy import PLACES, Anatomy, Linear
from spectrim.errors import BudgetError
from spectrim.files import parse_json
from spectrim.maths.decompose import Rank, head_ranks
from spectrim.maths.rounding import Grid, fitting_group

_log = logging.getLogger("spectrim")
N = TypeVar("N", int, np.ndarray)
PIVOT = torch.int32.itemsize  # bytes of one pivot


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Integers(_Part):
    """Which weights of a row are integers.

    ``bits`` are those of the dense weight, or of both factors where the row has a rank. ``residual`` are those of a
    whole weight [out, in] that is added to the product of the factors, which may then stay as they are (``bits`` None).
    ``group`` inputs share a scale, all inputs of an output where it is None or does not divide them. An asymmetric grid
    has a zero point for each scale.
    """

    bits: int | None = Field(default=None, ge=2, le=8)
    residual: int | None = Field(default=None, ge=2, le=8)
    group: Literal[32, 64, 128] | None = 128
    symmetric: bool = True

    def grids(self, linear: Linear, rank: Rank | None) -> dict[str, tuple[int, int, Grid]]:
        """Outputs, inputs and grid of each integer weight of a linear; by part: A, B, R, or "" for the dense one."""
        out, size = linear.out_features, linear.in_features
        shapes = {"": (out, size, self.bits)} if rank is None else {"R": (out, size, self.residual)}
        if rank is not None:
            k = counted(rank)[0]
            shapes |= {"A": (out, k, self.bits), "B": (k, size, self.bits)}
        return {
            part: (rows, columns, Grid(bits, fitting_group(columns, self.group), self.symmetric))
            for part, (rows, columns, bits) in shapes.items()
            if bits is not None
        }


class PlanRow(_Part):
    """One linear: its rank (None: dense; a list: one for each head of a q, k or v), and what follows from it.

    ``error`` is the relative error in the recipe's metric, Σ_{i>k} s_i / Σ s_i (None where no spectrum was made);
    ``metric`` says which samples the metric came from; ``loss`` is the increase of the model's loss, in nats, that is
    predicted of this row alone (None where nothing predicts it). ``pivoted`` says that the factors are stored by
    pivots, for which a row needs one rank below its number of outputs; of a dense row it says nothing. ``integers``
    says which weights are quantized; None if none are. Only ``rank``, ``pivoted`` and ``integers`` are obeyed, all else
    are notes.
    """

    rank: Rank | None
    pivoted: bool = False
    bytes: int = Field(ge=0)
    dense_bytes: int = Field(ge=0)
    error: float | None = Field(default=None, allow_inf_nan=False)
    metric: str | None = None
    loss: float | None = Field(default=None, allow_inf_nan=False)
    integers: Integers | None = None

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
    retain: float | None = Field(default=None, gt=0, le=1)
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

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the linears that are factored or hold integers, in the order of the plan."""
        return tuple(name for name, row in self.linears.items() if row.rank is not None or row.integers is not None)

    @property
    def pivoted(self) -> set[str]:
        """Names of the linears that are stored by pivots."""
        return {name for name, row in self.linears.items() if row.pivoted}

    def by_place(self, parts: Anatomy) -> dict[str, dict[str, Any]]:
        """What the plan does to the linears of each place that has some: counts, ranks and bytes.

        ``ranks`` are the smallest, median and largest rank of the factored linears, with ranks of heads added up; the
        list is empty if none is factored.
        """
        summary = {}
        for place in PLACES:
            rows = [self.linears[linear.name] for linear in parts.linears if linear.place == place]
            if not rows:
                continue
            ranks = sorted(counted(row.rank)[0] for row in rows if row.rank is not None)
            summary[str(place)] = {
                "linears": len(rows),
                "dense": len(rows) - len(ranks),
                "factored": len(ranks),
                "pivoted": sum(row.pivoted for row in rows),
                "by_head": sum(isinstance(row.rank, tuple) for row in rows),
                "ranks": [ranks[0], ranks[len(ranks) // 2], ranks[-1]] if ranks else [],
                "bytes": sum(row.bytes for row in rows),
                "dense_bytes": sum(row.dense_bytes for row in rows),
            }
        return summary

    def json(self) -> str:  # type: ignore[override]
        """The text of plan.json; ranks by head stand on one line."""
        text = json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
        return re.sub(r"\[\n[\d,\s]*\]", lambda ranks: json.dumps(json.loads(ranks[0])), text)

    @classmethod
    def read(cls, path: str | Path, parts: Anatomy | None = None) -> "Plan":
        """A plan from its file, checked against the model that it is for; bytes are counted anew from the ranks.

        Without `parts` it is as it stands in the file, and no model has been asked.

        Raises:
            BudgetError: the file cannot be read, is no plan, or does not fit the model; names the linear.
        """
        try:
            content = parse_json(Path(path).read_bytes())
            plan = cls.model_validate_json(json.dumps(content), strict=True)
        except (OSError, ValueError) as error:  # a ValidationError is a ValueError
            detail: object = error
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                detail = ": ".join([*map(str, first["loc"]), first["msg"]])
            raise BudgetError(
                f"{path} is no plan that can be read ({detail}); correct it, or write one with spectrim compress"
            ) from error
        return plan if parts is None else plan.fitted(parts, str(path))

    def fitted(self, parts: Anatomy, where: str = "the plan") -> "Plan":
        """This plan with a row for every linear of the model, in its order, and bytes counted from the ranks.

        Raises:
            BudgetError: it does not fit the model; names the linear.
        """
        known = {linear.name: linear for linear in parts.linears}
        if strange := sorted(self.linears.keys() - known.keys()):
            raise BudgetError(f"{where} plans for {strange[0]!r}, which the model lacks; use a plan of this model")
        rows = {}
        for name, linear in known.items():
            row = self.linears.get(name)
            rank = None if row is None else row.rank
            pivoted = row is not None and row.pivoted and rank is not None
            if rank is not None:
                _check_rank(linear, rank, where)
                if pivoted and (not isinstance(rank, int) or rank >= linear.out_features):
                    raise BudgetError(
                        f"{where} stores '{name}' by pivots, which needs one rank below its {linear.out_features} "
                        "outputs; set pivoted to false"
                    )
            integers = None if row is None else row.integers
            if integers is not None:
                _check_integers(linear, rank, pivoted, integers, where)
            # The notes of a row may be those of another rank.
            rows[name] = plan_row(linear, rank, pivoted=pivoted, integers=integers)
            if rows[name].bytes > linear.nbytes:
                _log.warning("%s stores '%s' in more bytes than its dense weight has", where, name)
        return Plan(recipe=self.recipe, retain=self.retain, linears=rows)


def plan_row(
    linear: Linear,
    rank: Rank | None,
    error: float | None = None,
    metric: str | None = None,
    *,
    loss: float | None = None,
    pivoted: bool = False,
    integers: Integers | None = None,
) -> PlanRow:
    """The row of one linear, with its bytes."""
    return PlanRow(
        rank=rank,
        pivoted=pivoted,
        bytes=row_bytes(linear, rank, integers, pivoted),
        dense_bytes=linear.nbytes,
        error=error,
        metric=metric,
        loss=loss,
        integers=integers,
    )


def row_bytes(linear: Linear, rank: Rank | None, integers: Integers | None = None, pivoted: bool = False) -> int:
    """Stored bytes of one linear, bias not counted; of integers with scales, zero points and shapes."""
    grids = {} if integers is None else integers.grids(linear, rank)
    packed = sum(grid.nbytes(out, size, linear.dtype.itemsize) for out, size, grid in grids.values())
    if rank is None:
        return packed if grids else linear.nbytes
    return packed if "A" in grids else packed + factor_bytes(linear, *counted(rank), pivoted)


def counted(rank: Rank) -> tuple[int, int]:
    """Directions of all heads together, and the number of heads."""
    ranks = head_ranks(rank)
    return sum(ranks), len(ranks)


def factor_params(linear: Linear, count: N, heads: int = 1, pivoted: bool = False) -> N:
    """Numbers in the factors of one linear with `count` directions in all, one count or an array of them.

    A direction pays for all inputs and for the outputs of its own head. Pivots spare a square of `count` numbers.
    """
    return count * (linear.in_features + linear.out_features // heads - pivoted * count)


def factor_bytes(linear: Linear, count: N, heads: int = 1, pivoted: bool = False) -> N:
    """Bytes of the same, with those of the pivots."""
    return factor_params(linear, count, heads, pivoted) * linear.dtype.itemsize + pivoted * PIVOT * count


def pays_by_pivots(linear: Linear, rank: Rank | None) -> bool:
    """Whether pivots save bytes at this rank: their indices outweigh what they spare of one or two directions."""
    if not isinstance(rank, int) or rank >= linear.out_features:
        return False
    return factor_bytes(linear, rank, pivoted=True) < factor_bytes(linear, rank)


def _check_integers(linear: Linear, rank: Rank | None, pivoted: bool, integers: Integers, where: str) -> None:
    wrong = None
    if rank is None and (integers.bits is None or integers.residual is not None):
        wrong = "a dense row has bits and no residual"
    elif rank is not None and (pivoted or not isinstance(rank, int)):
        wrong = "only rows of one rank and without pivots can have integers"
    elif integers.bits is None and integers.residual is None:
        wrong = "bits or a residual are needed"
    if wrong is not None:
        raise BudgetError(f"{where} gives '{linear.name}' integers, but {wrong}; set integers to null, or correct them")


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
