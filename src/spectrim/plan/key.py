"""The name of what a recipe and a plan made of a model: a digest of all that it depends on."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence

from spectrim.anatomy import Anatomy
from spectrim.calibrate import Statistics
from spectrim.metrics.spectra import cache_key
from spectrim.plan.plan import PlanRow
from spectrim.recipe import Recipe

COMPENSATED = 9  # version of what compensated tensors on disk mean; a change makes earlier files unused


def made_key(
    versions: Sequence[int],
    statistics: Statistics,
    parts: Anatomy,
    recipe: Recipe,
    rows: Mapping[str, PlanRow],
    without: Collection[str] = (),
) -> str:
    """16 hexadecimal digits; ``without`` names parts of the recipe that come into play later.

    ``versions`` are those of what is kept, and of whatever it was made from.

    All of a recipe counts but what says who it is, and the allocation, of which the rows of the plan are what came out.
    """
    content = recipe.model_dump(mode="json", exclude={"version", "name", "summary", "paper", "allocation", *without})
    forms = {name: [row.form, row.spec] for name, row in rows.items()}
    key = json.dumps([*versions, cache_key(recipe.metric, statistics, parts), content, forms], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]
