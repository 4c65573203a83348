"""The plan: the form of every linear, its bytes and its error; a JSON file that a person can read and edit."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from spectrim.anatomy import Anatomy
from spectrim.errors import BudgetError, ModelError
from spectrim.files import parse_json
from spectrim.linear import PLACES, Linear
from spectrim.plan.units import units_of
from spectrim.storage import DENSE, Spec, form
from spectrim.storage.narrow import READERS

_log = logging.getLogger("spectrim")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanRow(_Part):
    """One linear: the form in which it is stored, what the form says of it (`spec`), and what follows from both.

    In the file, the entries of the spec stand beside the others: ``{"form": "low-rank", "rank": 8, "pivoted": false,
    "bytes": …}``. ``error`` is the relative error in the recipe's metric (None where no spectrum was made); ``metric``
    says which samples the metric came from; ``loss`` is the increase of the model's loss, in nats, that is predicted of
    this row alone (None where nothing predicts it); ``reason`` says why a dense row had to be dense. Only the form and
    its spec are obeyed, all else are notes. Without a form, a row with a rank is low-rank, and one without is dense.
    """

    form: str
    spec: dict[str, Any] = {}
    bytes: int = Field(ge=0)
    dense_bytes: int = Field(ge=0)
    error: float | None = Field(default=None, allow_inf_nan=False)
    metric: str | None = None
    loss: float | None = Field(default=None, allow_inf_nan=False)
    reason: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, row: Any) -> Any:
        """The entries of the spec, apart from the others."""
        if not isinstance(row, dict) or "spec" in row:
            return row
        notes = {key: value for key, value in row.items() if key in cls.model_fields}
        spec = {key: value for key, value in row.items() if key not in notes}
        if spec.get("integers", 0) is None:  # releases before 0.2 wrote them so
            del spec["integers"]
        if "form" not in notes:
            notes["form"] = DENSE if spec.get("rank") is None else "low-rank"
        if notes["form"] == DENSE and spec.get("rank", 0) is None:
            spec = {key: value for key, value in spec.items() if key not in ("rank", "pivoted")}
        return notes | {"spec": spec}

    @model_serializer
    def _together(self) -> dict[str, Any]:
        notes = {name: getattr(self, name) for name in type(self).model_fields if name not in ("form", "spec")}
        return {"form": self.form, **self.spec, **notes}

    @property
    def rank(self) -> int | None:
        """Directions of all heads together; None where the form has no rank."""
        rank = self.spec.get("rank")
        return sum(rank) if isinstance(rank, list | tuple) else rank


class Plan(_Part):
    """A whole plan; rows by runtime name, as `spectrim anatomy` prints them.

    ``limit`` says what it was asked to keep to, such as ``size-3.5GB``; ``retain`` is that where it is a share.
    ``tables`` are input embedding and output head, where they do not stay dense as a matter of course.
    """

    version: Literal[1, 2] = 2
    recipe: str
    retain: float | None = Field(default=None, gt=0, le=1)
    limit: str | None = None
    linears: dict[str, PlanRow]
    tables: dict[str, PlanRow] = {}

    @property
    def rows(self) -> dict[str, PlanRow]:
        """Those of linears and tables together."""
        return {**self.linears, **self.tables}

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
        losses = [row.loss for row in self.rows.values() if row.loss is not None]
        return sum(losses) if losses else None

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the linears that do not stay dense, in the order of the plan."""
        return tuple(name for name, row in self.linears.items() if row.form != DENSE)

    @property
    def exchanged(self) -> tuple[str, ...]:
        """The same of linears and tables."""
        return tuple(name for name, row in self.rows.items() if row.form != DENSE)

    def by_place(self, parts: Anatomy) -> dict[str, dict[str, Any]]:
        """What the plan does to the linears of each place that has some, as `summed_up` has it."""
        summary = {}
        for place in PLACES:
            if rows := [self.linears[linear.name] for linear in parts.linears if linear.place == place]:
                summary[str(place)] = summed_up(rows)
        return summary

    def json(self) -> str:  # type: ignore[override]
        """The text of plan.json; ranks by head stand on one line."""
        content = self.model_dump(mode="json", exclude=set() if self.tables else {"tables"})
        text = json.dumps(content, indent=2) + "\n"
        return re.sub(r"\[\n[\d,\s]*\]", lambda ranks: json.dumps(json.loads(ranks[0])), text)

    @classmethod
    def read(cls, path: str | Path, parts: Anatomy | None = None) -> "Plan":
        """A plan from its file, checked against the model that it is for; bytes are counted anew.

        Without `parts` it is as it stands in the file, and no model has been asked.

        Raises:
            BudgetError: the file cannot be read, is no plan, or does not fit the model; names the linear.
        """
        try:
            content = parse_json(Path(path).read_bytes())
            plan = cls.model_validate_json(json.dumps(content), strict=True)
            for name, row in plan.rows.items():
                with _named(str(path), name, row):
                    form(row.form).heads(row.spec)
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
        tables = {table.name: table for table in parts.tables if table.name in self.tables}
        if strange := sorted((self.linears.keys() - known.keys()) | (self.tables.keys() - tables.keys())):
            raise BudgetError(f"{where} plans for {strange[0]!r}, which the model lacks; use a plan of this model")
        rows = {}
        for name, linear in (known | tables).items():
            row = self.rows.get(name, PlanRow(form=DENSE, bytes=0, dense_bytes=0))
            with _named(where, name, row):
                form(row.form).check(linear, row.spec)
                # The notes of a row may be those of another spec.
                rows[name] = plan_row(linear, row.form, row.spec)
            if rows[name].bytes > linear.nbytes:
                _log.warning("%s stores '%s' in more bytes than its dense weight has", where, name)
        units = units_of(parts.linears)
        # Fewer inputs harm nobody else; outputs that are missing have to be read by no one.
        readers = {linear.name for linear in parts.linears if linear.role in READERS}
        sides = {"inputs": readers, "outputs": {name for first in units.values() for name in first}}
        for name, row in rows.items():
            for side in sides.keys() & row.spec.keys():
                if name not in sides[side]:
                    raise BudgetError(
                        f"{where} takes {side} from '{name}', which are no units of an MLP that it "
                        f"{'reads' if side == 'inputs' else 'computes'}; correct it, or make it {DENSE}"
                    )
        for reader, first in units.items():
            read = rows[reader].spec.get("inputs", parts.linear(reader).in_features)
            for name in first:
                if rows[name].spec.get("outputs", read) < read:
                    raise BudgetError(
                        f"{where} leaves {rows[name].spec['outputs']} units to '{name}' and has {read} read by "
                        f"'{reader}'; give both the same number"
                    )
        found = {name: rows.pop(name) for name in tables}
        return Plan(recipe=self.recipe, retain=self.retain, limit=self.limit, linears=rows, tables=found)

    def check_outputs(self, units: Mapping[str, tuple[str, ...]]) -> None:
        """Raise BudgetError where outputs are taken that are no `units` (see `units_of`): something else reads them."""
        computed = {name for first in units.values() for name in first}
        for name, row in self.linears.items():
            if "outputs" in row.spec and name not in computed:
                raise BudgetError(
                    f"the plan takes outputs from '{name}', and something in its MLP needs all of them (a norm, or "
                    f"other parameters); correct it, or make it {DENSE}"
                )


def summed_up(rows: Sequence[PlanRow]) -> dict[str, Any]:
    """How many rows there are, counts by form, ranks and bytes.

    ``ranks`` are the least, the median and the most of those that have one, those of heads added up; none of none.
    """
    ranks = sorted(row.rank for row in rows if row.rank is not None)
    return {
        "linears": len(rows),
        "forms": dict(sorted(Counter(row.form for row in rows).items())),
        "ranks": [ranks[0], ranks[len(ranks) // 2], ranks[-1]] if ranks else [],
        "bytes": sum(row.bytes for row in rows),
        "dense_bytes": sum(row.dense_bytes for row in rows),
    }


@contextmanager
def _named(where: str, name: str, row: PlanRow) -> Iterator[None]:
    """What a form says of a row, as an error of the plan that names the linear."""
    try:
        yield
    except ModelError as error:
        remedy = "take it out" if row.form == DENSE else f"correct it, or make it {DENSE}"
        raise BudgetError(f"{where} stores '{name}' in the form '{row.form}', but {error}; {remedy}") from error


def plan_row(
    linear: Linear,
    kind: str = DENSE,
    spec: Spec | None = None,
    *,
    error: float | None = None,
    metric: str | None = None,
    loss: float | None = None,
    reason: str | None = None,
) -> PlanRow:
    """The row of one linear in a form, with its bytes; the others are notes."""
    spec = dict(spec or {})
    size = form(kind).nbytes(linear, spec)
    notes: dict[str, Any] = {"error": error, "metric": metric, "loss": loss, "reason": reason}
    return PlanRow(form=kind, spec=spec, bytes=size, dense_bytes=linear.nbytes, **notes)
