"""What a checkpoint records of how it was made."""

from collections import Counter
from typing import Any

from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.calibrate import Statistics
from spectrim.calibrate.experts import tokens_by_expert
from spectrim.plan.plan import Plan
from spectrim.recipe import Recipe
from spectrim.storage import form


def provenance(
    model: PreTrainedModel,
    parts: Anatomy,
    recipe: Recipe,
    statistics: Statistics | None,
    plan: Plan,
    unreached: frozenset[str],
) -> dict[str, Any]:
    """What spectrim.json records of a plan: recipe, what is kept in all and by place, data, versions.

    `unreached` are the names of the linears that no sample reaches.
    """
    params = sum(linear.params for linear in parts.linears)
    kept = sum(
        form(row.form).params(linear, row.spec)
        for linear, row in zip(parts.linears, plan.linears.values(), strict=True)
    )
    whole = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    saved = plan.dense_bytes - plan.bytes + sum(row.dense_bytes - row.bytes for row in plan.tables.values())
    data = None if statistics is None else statistics.manifest
    return {
        "recipe": recipe.model_dump(mode="json"),
        "limit": plan.limit,
        "retention": {
            **({} if plan.retain is None else {"asked": plan.retain}),
            "bytes": plan.bytes / plan.dense_bytes,
            "params": kept / params,
            "checkpoint": (whole - saved) / whole,
        },
        "bytes": {"linears": plan.bytes, "linears_dense": plan.dense_bytes},
        "places": plan.by_place(parts),
        **({"tables": plan.model_dump(mode="json")["tables"]} if plan.tables else {}),
        "kept": dict(Counter(row.reason for row in plan.linears.values() if row.reason is not None)),
        "unreached": sorted(unreached - set(plan.changed)),
        **({"experts": experts} if (experts := tokens_by_expert(statistics, parts.linears)) else {}),
        "data": None if data is None else data.data.model_dump(mode="json"),
        "calibration": None if data is None else data.settings.model_dump(mode="json"),
        "versions": None if data is None else data.versions,
    }
