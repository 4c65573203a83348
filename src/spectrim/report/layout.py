"""How the linears of a checkpoint are stored, in the order of its blocks and roles."""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from spectrim.anatomy import ROLES, anatomy
from spectrim.checkpoint import read_provenance
from spectrim.checkpoint.read import load_empty
from spectrim.linear import expert_span
from spectrim.plan.plan import Plan, PlanRow, summed_up

PLAN = "plan.json"
PARTS = ("tower", "connector", "backbone", "experts", "embeddings")  # further ones follow under their own names
_ITEMSIZE = 2  # bytes of a dense weight, where the model does not tell


@dataclass(frozen=True)
class Cell:
    """The linears of one part, block and role: how many, how they are stored, and what it costs.

    `block` is None outside blocks. `rank` is the median of those that have one, `bits` are per weight, and `loss` is
    the predicted rise of the loss in nats, None where nothing predicts it.
    """

    part: str
    block: int | None
    role: str
    linears: int
    forms: str
    rank: int | None
    bits: float
    bytes: int
    dense_bytes: int
    loss: float | None


@dataclass(frozen=True)
class Expert:
    """What one expert of a block saw in calibration, over all modalities, and how its linears are stored."""

    block: int | None
    number: int
    tokens: int
    forms: str
    rank: int | None
    bits: float
    bytes: int


@dataclass(frozen=True)
class Layout:
    """All cells of one checkpoint, part by part; `name` is the last part of its path.

    `experts` are those whose tokens the record says: none of models without experts, and of plans without samples.
    """

    name: str
    recipe: str
    cells: tuple[Cell, ...]
    experts: tuple[Expert, ...] = ()


@dataclass(frozen=True)
class _Spot:
    part: str
    block: int | None
    role: str
    params: int | None


def layout(directory: Path) -> Layout:
    """The layout of a checkpoint. Raises BudgetError or CheckpointError where its plan or its record is damaged."""
    record, plan = read_provenance(directory), Plan.read(directory / PLAN)
    spots = _spots(directory)
    groups: dict[tuple[str, int | None, str], list[tuple[PlanRow, int]]] = defaultdict(list)
    each: dict[tuple[int | None, int, int], list[tuple[PlanRow, int]]] = defaultdict(list)
    for name, row in plan.rows.items():
        spot = spots.get(name) or _by_name(name)
        weighed = row, spot.params or row.dense_bytes // _ITEMSIZE
        groups[spot.part, spot.block, spot.role].append(weighed)
        if (seen := _seen(record.get("experts"), name)) is not None:
            each[spot.block, *seen].append(weighed)
    order = [*PARTS, *sorted({part for part, _, _ in groups} - {*PARTS})]
    keys = sorted(groups, key=lambda key: order.index(key[0]))
    recipe = record.get("recipe")
    title = recipe.get("name") if isinstance(recipe, dict) else None
    return Layout(
        directory.name,
        str(title or plan.recipe),
        tuple(_cell(*key, groups[key]) for key in keys),
        tuple(Expert(*key, **_stored(rows)) for key, rows in each.items()),
    )


def _cell(part: str, block: int | None, role: str, rows: list[tuple[PlanRow, int]]) -> Cell:
    losses = [row.loss for row, _ in rows if row.loss is not None]
    return Cell(
        part=part,
        block=block,
        role=role,
        linears=len(rows),
        dense_bytes=sum(row.dense_bytes for row, _ in rows),
        loss=sum(losses) if losses else None,
        **_stored(rows),
    )


def _stored(rows: list[tuple[PlanRow, int]]) -> dict[str, Any]:
    """Forms, rank, bits and bytes of some linears, each with the number of its weights."""
    whole = summed_up([row for row, _ in rows])
    ranks = [row.rank for row, _ in rows if row.rank is not None]
    return {
        "forms": ", ".join(name if len(rows) == 1 else f"{count} {name}" for name, count in whole["forms"].items()),
        "rank": round(median(ranks)) if ranks else None,
        "bits": 8 * whole["bytes"] / max(1, sum(params for _, params in rows)),
        "bytes": whole["bytes"],
    }


def _seen(record: Any, name: str) -> tuple[int, int] | None:
    """Number of the expert that a linear belongs to, and its tokens, of a record of these by block or list."""
    for home, tokens in record.items() if isinstance(record, dict) else ():
        inside = name.startswith(f"{home}.")
        if inside and (span := expert_span(name, home.rpartition(".")[0])) is not None:
            number = name[slice(*span)]
            return (int(number), tokens[number]) if isinstance(tokens, dict) and number in tokens else None
    return None


def _spots(directory: Path) -> dict[str, _Spot]:
    """Where the linears of a model are, from its config alone; nothing where the model cannot be built from it."""
    try:
        parts = anatomy(load_empty(directory))
    except Exception:  # a config is somebody else's, and what builds models may raise anything
        return {}
    numbers = {
        block: number
        for place in ("tower", "connector", "backbone")
        for number, block in enumerate(parts.blocks(place))
    }
    found = {}
    for linear in parts.linears:
        block = None if linear.block is None else numbers[linear.block]
        found[linear.name] = _Spot(
            linear.place if linear.expert is None else "experts", block, linear.role, linear.params
        )
    for kept in parts.kept:
        if kept.name not in found:
            found[kept.name] = _Spot(*_kept(kept.name, kept.reason), kept.params or None)
    return found


def _kept(name: str, reason: str) -> tuple[str, int | None, str]:
    """Part, block and role of a matrix that is no plain linear, should a plan store it in another form."""
    guess = _by_name(name)
    return ("experts" if "experts" in reason else "embeddings"), guess.block, guess.role


def _by_name(name: str) -> _Spot:
    """A guess from the name alone."""
    found = re.search(r"\.(\d+)\.", name)
    last = name.rpartition(".")[2]
    part = "experts" if ".experts" in name else "tower" if "vis" in name else "backbone"
    if found is None:
        part = "embeddings" if part == "backbone" else part
    return _Spot(part, int(found[1]) if found else None, ROLES.get(last, last), None)
