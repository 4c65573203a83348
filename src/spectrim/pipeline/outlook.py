"""What a compression would come to, before it is made: bytes and predicted loss by part, and over sizes."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table

from spectrim.calibrate import Statistics
from spectrim.calibrate.data import check_there, reload_data, source_data
from spectrim.errors import BudgetError, RecipeError
from spectrim.evaluate.divergence import Predictions
from spectrim.linear import PLACES
from spectrim.pipeline.budget import Budget
from spectrim.pipeline.losses import priced
from spectrim.pipeline.stages import Compression
from spectrim.plan.plan import Plan, PlanRow, summed_up
from spectrim.recipe import Recipe

_POINTS = 9  # of the curve between the smallest plan and the dense model
_WIDTH = 40  # characters of its longest bar
RATIOS = (0.5, 0.7, 1.4, 2.0)  # of the bytes of linears that were asked for, at which plans are measured beside it
SAMPLES = 32  # of each modality, on which they are
_ALL = 1 << 60  # tokens


@dataclass(frozen=True)
class Point:
    """A size of all files, the linears' part of it, and the predicted rise of the loss, nats per token.

    ``nats`` is what measurements say of it, the divergence from the dense model by modality; None without any.
    """

    file_bytes: int
    linear_bytes: int
    loss: float
    nats: dict[str, float] | None = None


@dataclass(frozen=True)
class Part:
    """The linears of one place and role: how they are stored, in which bits per weight, at which predicted loss.

    ``rank`` is the median of those that have one. ``loss`` is None where the recipe predicts none.
    """

    place: str
    role: str
    linears: int
    forms: dict[str, int]
    rank: int | None
    bits: float
    bytes: int
    dense_bytes: int
    loss: float | None


@dataclass(frozen=True)
class Outlook:
    """A plan with the bytes of all files before and after, its parts, and the losses at other sizes.

    ``cache_bytes`` and ``dense_cache_bytes`` are those of the key/value cache that a size was to hold, if any.
    ``less`` and ``more`` are the plans with a tenth less and more for the linears, where there are such. ``curve`` and
    both are empty where the recipe predicts no loss. ``nats`` is what measurements say of the plan, as of a `Point`.
    """

    plan: Plan
    file_bytes: int
    dense_bytes: int
    parts: tuple[Part, ...]
    less: Point | None
    more: Point | None
    curve: tuple[Point, ...]
    cache_bytes: int | None = None
    dense_cache_bytes: int | None = None
    nats: dict[str, float] | None = None

    def json(self) -> str:
        """Indented JSON; the plan as in plan.json."""
        content = asdict(self)
        del content["plan"]  # no dataclass; it comes last, as it stands in its own file
        whole = {"loss": self.plan.loss, "bytes": self.plan.bytes, **content, "plan": json.loads(self.plan.json())}
        return json.dumps(whole, indent=2) + "\n"

    def table(self) -> Table:
        """The parts, for a terminal."""
        grid = Table(box=None, pad_edge=False)
        for heading in ("place", "role", "linears", "stored as", "rank", "bits", "bytes", "kept", "predicted loss"):
            grid.add_column(heading, justify="left" if heading in ("place", "role", "stored as") else "right")
        for part in self.parts:
            grid.add_row(
                part.place,
                part.role,
                str(part.linears),
                ", ".join(f"{count} {form}" for form, count in part.forms.items()),
                "–" if part.rank is None else str(part.rank),
                f"{part.bits:.2f}",
                f"{part.bytes:,}",
                f"{part.bytes / part.dense_bytes:.1%}",
                "–" if part.loss is None else f"{part.loss:.4f}",
            )
        return grid

    def lines(self) -> list[str]:
        """What the whole takes and loses, what a tenth of the linears' bytes is worth, and the curve as bars."""
        whole = (
            f"all files: {self.file_bytes:,} of {self.dense_bytes:,} bytes ({self.file_bytes / self.dense_bytes:.1%})"
        )
        if self.cache_bytes is not None and self.dense_cache_bytes is not None:
            share = self.cache_bytes / self.dense_cache_bytes
            whole += f"; key/value cache: {self.cache_bytes:,} of {self.dense_cache_bytes:,} bytes ({share:.1%})"
        if self.plan.loss is None:
            return [f"{whole}; this recipe predicts no loss (spectrim, curvature and laser do)"]
        found = [f"{whole}; predicted rise of the loss {self.plan.loss:.4f} nats per token"]
        if self.nats is not None:
            found.append(f"by what was measured: {_listed(self.nats)} nats per token")
        for point, words in ((self.less, "less"), (self.more, "more")):
            if point is not None:
                change = point.loss - self.plan.loss
                found.append(f"a tenth {words} for linears: {point.file_bytes:,} bytes, {change:+.4f} nats")
        most = max((point.loss for point in self.curve), default=0.0)
        for point in self.curve:
            bar = "█" * round(_WIDTH * point.loss / most) if most else ""
            told = "" if point.nats is None else f"  {_listed(point.nats)}"
            found.append(f"{point.file_bytes:>15,} bytes  {point.loss:8.4f} nats{told}  {bar}".rstrip())
        return found


def _listed(nats: Mapping[str, float]) -> str:
    return ", ".join(f"{modality} {value:.4f}" for modality, value in nats.items())


def measurable(recipe: Recipe, statistics: Statistics | None) -> Statistics:
    """The statistics, where plans of the recipe can be measured.

    Raises:
        RecipeError: the recipe predicts no losses that a measurement could correct.
        SampleError: a source of samples is gone.
    """
    if (found := priced(recipe, statistics)) is None:
        raise RecipeError(
            f"recipe '{recipe.name}' predicts no losses that a measurement could correct; leave out --measure, or take "
            "spectrim, curvature or laser"
        )
    check_there(found)
    return found


def measure(prepared: Compression, plans: Sequence[Plan]) -> None:
    """Make plans as the recipe says, and measure on 32 samples of each modality how far they are from the dense model.

    The samples come from the sources of the statistics with the next seed, so that most are new where a source is
    large. What was measured before is not made again; what compensation finds stays in the statistics directory, too.

    Raises:
        RecipeError, SampleError: see `measurable`.
        StatisticsError: the samples are other ones now.
        NumericalError: logits are not finite.
    """
    statistics, known, progress = measurable(prepared.recipe, prepared.statistics), prepared.measured, prepared.progress
    assert known is not None
    missing = {plan.loss: plan for plan in plans if plan.loss and plan.loss not in known}
    if not missing:
        return
    model, processor, settings = prepared.model, prepared.processor, statistics.manifest.settings
    sees, seed = prepared.parts.tower is not None, settings.seed + 1
    reload_data(model, processor, statistics, sees=sees, samples=1)  # are the sources what they were?
    samples = min(SAMPLES, settings.samples)
    data = source_data(model, processor, statistics, sees=sees, seed=seed, samples=samples)
    with tempfile.TemporaryDirectory() as folder:
        dense = Predictions(Path(folder))
        dense.gather(model, data, tokens=_ALL, seed=seed, progress=None)
        for number, (loss, plan) in enumerate(missing.items()):
            if progress is not None:
                progress("measure", number, len(missing))
            with prepared.applied(plan) as small:
                known.add(loss, {str(row.modality): row.mean for row in dense.compare(small)})
    if progress is not None:
        progress("measure", len(missing), len(missing))


def outlook(prepared: Compression, budget: Budget, *, measured: bool = False) -> Outlook:
    """What a limit would come to; `measured`: and what it costs (see `measure`), besides at four other sizes.

    Raises BudgetError where the limit cannot be met.
    """
    plan = prepared.planned(budget)
    sizes = prepared.sizes
    share = plan.bytes / plan.dense_bytes

    def other(retain: float) -> Plan | None:
        try:
            if budget.size is None:
                return prepared.plan(retain)
            size = budget.size_bytes + round((retain - share) * plan.dense_bytes)  # tables have their share of it
            return prepared.planned(replace(budget, size=min(size, budget.whole(sizes) - 1)))
        except BudgetError:  # below the smallest
            return None

    if measured:
        others = [other(ratio * share) for ratio in RATIOS if ratio * share < 1]
        measure(prepared, [plan, *(one for one in others if one is not None)])
    known = prepared.measured

    def nats(plan: Plan) -> dict[str, float] | None:
        return known.at(plan.loss) if known and plan.loss is not None else None

    def point(retain: float) -> Point | None:
        found = other(retain)
        return None if found is None else Point(sizes.of(found), found.bytes, found.loss or 0.0, nats(found))

    less = more = None
    curve: list[Point] = []
    if plan.loss is not None:
        less, more = point(0.9 * share), point(min(1.0, 1.1 * share)) if share < 1 else None
        # Equal ratios of sizes: losses rise fast where few bytes are left.
        shares = [max(0.05, share / 4) ** (1 - step / (_POINTS - 1)) for step in range(_POINTS)]
        curve = [found for one in shares if (found := point(one)) is not None]
    parts = []
    for place in PLACES:
        linears = [linear for linear in prepared.parts.linears if linear.place == place]
        for role in dict.fromkeys(linear.role for linear in linears):
            own = [linear for linear in linears if linear.role == role]
            parts.append(_part(place, role, [plan.linears[linear.name] for linear in own], sum(x.params for x in own)))
    for table in prepared.parts.tables:
        if (row := plan.tables.get(table.name)) is not None:
            parts.append(_part(table.place, table.role, [row], table.params))
    cache = None if budget.context is None else sizes.cache(budget)
    return Outlook(
        plan,
        sizes.of(plan),
        sizes.dense,
        tuple(parts),
        less,
        more,
        tuple(curve),
        cache_bytes=None if cache is None else cache.under(plan),
        dense_cache_bytes=None if cache is None else cache.dense,
        nats=nats(plan),
    )


def _part(place: str, role: str, rows: list[PlanRow], params: int) -> Part:
    whole, losses = summed_up(rows), [row.loss for row in rows if row.loss is not None]
    ranks = whole.pop("ranks")
    return Part(
        place=place,
        role=role,
        rank=ranks[1] if ranks else None,
        bits=8 * whole["bytes"] / params,
        loss=sum(losses) if losses else None,
        **whole,
    )
