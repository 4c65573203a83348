"""One compression as it was asked for, with all of it checked that can be checked before a model is loaded."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.calibrate import Statistics
from spectrim.calibrate.data import check_there
from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.snapshot import check_home
from spectrim.checkpoint import check_target, read_config
from spectrim.checkpoint.plain import check_experts, check_recipe, one_grid
from spectrim.checks import check_directory, check_once, check_sources
from spectrim.compensate.run import check_kinds
from spectrim.dense import check_dense
from spectrim.errors import BudgetError, RecipeError, SampleError, UsageError
from spectrim.files import user_path
from spectrim.linear import Linear
from spectrim.pipeline.budget import Budget, Sizes
from spectrim.pipeline.tables import least_bytes
from spectrim.plan.plan import Plan
from spectrim.plan.units import units_of
from spectrim.recipe import Recipe
from spectrim.settings import EFFORT, CalibrationOptions, effort
from spectrim.storage import DENSE, forms

_log = logging.getLogger("spectrim")


@dataclass(frozen=True)
class Job:
    """A recipe, and what is written where.

    `statistics` are the opened ones, None where samples are to be gathered, which then stay in `kept` (None: nowhere).
    `plan` is the plan to obey in place of the `budgets`. There is one of `targets` for each checkpoint.
    """

    recipe: Recipe
    statistics: Statistics | None
    kept: Path | None
    plan: str | Path | Plan | None
    budgets: tuple[Budget, ...]
    targets: tuple[Path, ...]

    def fitted_plan(self, parts: Anatomy) -> Plan:
        """The plan to obey, checked against the model. Raises BudgetError."""
        assert self.plan is not None
        return self.plan.fitted(parts) if isinstance(self.plan, Plan) else Plan.read(self.plan, parts)

    def check_parts(self, model: PreTrainedModel, parts: Anatomy) -> None:
        """What of the plan or the budgets the model rules out, before samples run. Raises SpectrimError."""
        if self.plan is not None:
            plan = self.fitted_plan(parts)
            plan.check_outputs(units_of(parts.linears, model))
            check_kinds(self.recipe, plan)
            _check_format(self.recipe, plan)
            if self.recipe.quantize.plain:
                check_experts(model, [name for name, row in plan.linears.items() if row.form != DENSE])
            return
        if self.recipe.quantize.plain:
            chosen = [linear for linear in parts.linears if self.recipe.allocation.reason(linear) is None]
            check_recipe(self.recipe, model, chosen)
        sizes, quantize = Sizes(model, parts), self.recipe.quantize
        for budget in self.budgets:
            free, share = shared(self.recipe, parts, budget, sizes)
            least = sum(min(form.least(linear, quantize) for form in forms()) for linear in free)
            if budget.context is not None:  # that of linears which stay dense is out of the share already
                cache = sizes.cache(budget)
                least += sum(cache.of(x) for x in free) - (cache.dense - cache.least(self.recipe.metric.per_head))
            least += sum(least_bytes(table, quantize) for table in priced_tables(self.recipe, parts, budget))
            if least > share or share <= 0:
                raise too_small(self.recipe, budget, sizes, share, max(least, 1))


def check_job(
    model: str | PreTrainedModel,
    out: str | Path | None,
    *,
    recipe: str | Path | Recipe,
    changes: dict[str, Any] | None,
    budgets: Sequence[Budget],
    plan: str | Path | Plan | None,
    stats: str | Path | Statistics | None,
    overwrite: bool,
    samples: Mapping[str, Any],
    trust_remote_code: bool = False,
) -> Job:
    """The job, where all of it can be done as far as is known; `samples` are the options of a calibration.

    With several budgets, `out` is the parent of the checkpoints. Raises SpectrimError of the kind that says what cannot
    be.
    """
    if bool(budgets) == (plan is not None):
        raise BudgetError("give either a limit, such as --size 3.5GB or --retain 0.6, or a plan")
    check_once([budget.label for budget in budgets], "the limit")
    if any(budget.size is not None for budget in budgets):  # the forms that lose least at a size
        base = Recipe.read(recipe)
        sized = {} if base.quantize.bits is not None else {"quantize.bits": "auto"}
        ranks = (changes or {}).get("quantize.bits", "") is None  # asked for nothing but ranks
        if base.allocation.rule == "loss-aware" and base.quantize.format == "spectrim" and not ranks:
            sized["quantize.embeddings"] = "auto"
        changes = {**sized, **(changes or {})}
    chosen = Recipe.read(recipe, changes)
    if plan is not None:
        _check_format(chosen, plan if isinstance(plan, Plan) else Plan.read(plan))
    statistics = stats if stats is None or isinstance(stats, Statistics) else Statistics.open(stats)
    check_samples(chosen, statistics, samples)
    kept: Path | None = None
    targets: tuple[Path, ...] = ()
    if out is not None:
        check_directory(out := user_path(out).absolute(), "-o")
        targets = tuple(out / budget.label for budget in budgets) if len(budgets) > 1 else (out,)
        home = str(model if isinstance(model, str) else model.name_or_path).partition("::")[0]
        read = [home, None if statistics is None else statistics.path, plan, recipe]
        protected = [Path(path) for path in read if path and isinstance(path, str | Path)]
        targets = tuple(check_target(target, overwrite=overwrite, protected=protected) for target in targets)
        if statistics is None and chosen.needs_statistics:
            kept = out.with_name(f"{out.name}.stats")
            check_home(kept)
    where = {"trust_remote_code": trust_remote_code}
    check_dense(read_config(model, where) if isinstance(model, str) else model)
    return Job(chosen, statistics, kept, plan, tuple(budgets), targets)


def check_samples(recipe: Recipe, statistics: Statistics | None, samples: Mapping[str, Any]) -> None:
    """Whether the statistics, or those that these options of a calibration would give, are what a recipe needs.

    Raises:
        RecipeError: they are not.
        SampleError: an option is out of its limits, a source of samples is none or is gone and needed again, or
            compensation or the end-to-end pass has one sample and none to judge by.
        UsageError: samples were asked for beside statistics, or for a recipe that reads none.
    """
    samples = {name: value for name, value in samples.items() if name != "memory"}  # which is of loading as well
    if statistics is not None and samples:
        raise UsageError(
            f"{CalibrationOptions.flag(next(iter(samples)))} has no effect beside statistics, which have their own "
            "samples; leave it out, or leave the statistics out"
        )
    options = CalibrationOptions.checked(**gathered(recipe, samples))
    has = options if statistics is None else statistics.manifest.settings
    for name, needed in (("gradients", recipe.needs_gradients), ("curvature", recipe.needs_curvature)):
        if needed and not getattr(has, name):
            what = "the statistics have" if statistics is not None else "the calibration is to gather"
            raise RecipeError(f"recipe '{recipe.name}' needs {name} and {what} none; calibrate with --{name}")
    how, number = recipe.compensate, min(has.samples, recipe.compensate.samples or has.samples)
    if how.kind != "none" and how.left_out(number) == number:
        raise SampleError(
            "compensate.weight=auto judges by samples that it leaves out, and there is one alone; give more, or set "
            "compensate.weight to a number"
        )
    if recipe.tune.epochs and has.seqlen < 2:
        raise SampleError(
            "the end-to-end pass (tune.epochs) compares predictions of a next token, and windows of one token "
            "(--seqlen 1) have none; give 2 or more, or set tune.epochs=0"
        )
    if recipe.tune.epochs and has.samples < 2:
        raise SampleError(
            "the end-to-end pass (tune.epochs) leaves out a sample to judge by, and there is one alone; give more, or "
            "set tune.epochs=0"
        )
    if statistics is not None and recipe.needs_samples:
        check_there(statistics)
    if statistics is None and samples and not recipe.needs_statistics:
        raise UsageError(
            f"{CalibrationOptions.flag(next(iter(samples)))} has no effect with recipe '{recipe.name}', which reads no "
            "samples; leave it out"
        )
    if statistics is None and recipe.needs_statistics:
        options.check_together()
        for form in options.curvature_forms.values():
            CurvatureForm.read(form)
        check_sources(options.text, options.images)


def shared(
    recipe: Recipe,
    parts: Anatomy,
    budget: Budget,
    sizes: Sizes,
    unreached: Collection[str] = (),
    samples: str = "",
) -> tuple[list[Linear], int]:
    """The linears that a recipe may change, and the bytes that they and priced tables share under a budget.

    `unreached` are the names of linears that none of the `samples` (their modality) reaches, which stay dense.

    Raises:
        BudgetError: there are no such linears, or there is no room for them.
        RecipeError: the allocation cannot compare them, or no sample reaches any of them.
    """
    part = recipe.allocation
    for pattern in (*part.keep, *part.only):
        if not any(fnmatchcase(linear.name, pattern) for linear in parts.linears):
            raise BudgetError(
                f"no linear that can be compressed matches the pattern '{pattern}'; `spectrim anatomy MODEL` lists them"
            )
    reasons = sorted({reason for linear in parts.linears if (reason := part.reason(linear)) is not None})
    wished = [linear for linear in parts.linears if part.reason(linear) is None]
    if not wished:
        why = "; ".join(reasons)
        raise BudgetError(f"every linear of the model stays dense ({why}); name other allocation.places or patterns")
    if part.rule == "sensitivity" and any(linear.place != "backbone" for linear in wished):
        raise RecipeError(
            "allocation 'sensitivity' measures text loss, to which tower and connector are nothing; "
            "set allocation.places=[backbone]"
        )
    free = [linear for linear in wished if linear.name not in unreached]
    if not free:
        raise RecipeError(
            f"no {samples} sample reaches any linear that the recipe may change; give samples that do, or "
            "choose a recipe that needs none, such as svd"
        )
    tables = priced_tables(recipe, parts, budget)
    limit = budget.linear_bytes(sizes) + sum(table.nbytes for table in tables)
    frozen = sizes.linears - sum(linear.nbytes for linear in free)
    if budget.context is not None:
        cache = sizes.cache(budget)
        frozen += cache.dense - sum(cache.of(linear) for linear in free)
    room = limit - sum(least_bytes(table, recipe.quantize) for table in tables)
    if frozen > max(room, 0):
        kept = list(reasons)
        kept += [f"no {samples} sample reaches them"] if len(free) < len(wished) else []
        remedy = "give samples that reach them" if len(free) < len(wished) else "let more of them be compressed"
        raise BudgetError(
            f"linears stay dense ({', '.join(kept)}) and take {frozen} bytes, of which there are {max(room, 0)}; "
            f"{budget.remedy(sizes, frozen - room)} or {remedy}"
        )
    return free, limit - frozen


def priced_tables(recipe: Recipe, parts: Anatomy, budget: Budget) -> tuple[Linear, ...]:
    """Input embedding and output head, where they share the bytes of a size with the linears."""
    wanted = recipe.quantize.embeddings is not None and budget.size is not None
    return parts.tables if wanted and recipe.allocation.rule == "loss-aware" else ()


def too_small(recipe: Recipe, budget: Budget, sizes: Sizes, share: int, least: int) -> BudgetError:
    """Where the smallest options of the linears take `least` bytes or more, and their share is less."""
    if budget.size is not None and share <= 0:
        what = f"all but the linears that can be compressed takes more than {budget.size}"
    elif budget.size is not None:
        cache = "" if budget.context is None else f" and a cache of {budget.context}"
        what = f"{budget.size} leaves {share} bytes to linears{cache}, less than the {least} of their smallest options"
    else:
        what = f"the budget of {share} bytes is less than the {least} of the smallest options"
    more = ", or let weights be integers (--set quantize.bits=auto)" if recipe.quantize.bits is None else ""
    return BudgetError(f"{what}; {budget.remedy(sizes, least - share)}{more}")


def with_patterns(
    changes: Mapping[str, Any] | None, keep: Sequence[str] | None, only: Sequence[str] | None
) -> dict[str, Any]:
    """Changes of a recipe with patterns of names that stay dense, or are compressed alone, where there are some."""
    given = {"allocation.keep": keep, "allocation.only": only}
    return {**(changes or {}), **{key: list(patterns) for key, patterns in given.items() if patterns}}


def with_effort(
    name: str,
    recipe: str | Path | Recipe,
    changes: Mapping[str, Any] | None,
    samples: Mapping[str, Any],
    *,
    gathers: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Changes of a recipe, and options of the calibration, with what a level of effort sets and nobody else does.

    Whoever changes anything of a recipe's compensation keeps all of it, and no number of a recipe is lowered. Samples
    are set where the compression `gathers` them, for a recipe that reads some.

    Raises:
        RecipeError: the recipe or the changes are none.
        UsageError: there is no such level.
    """
    level, changed, given = effort(name), dict(changes or {}), dict(samples)
    chosen = Recipe.read(recipe, changed)
    if chosen.compensate.kind != "none" and not any(key.split(".")[0] == "compensate" for key in changed):
        own = {key: _value(chosen, key) for key in level.compensation}
        more = {key: x for key, x in level.compensation.items() if isinstance(x, str) or x >= (own[key] or 0)}
        changed = {**more, **changed}
        chosen = Recipe.read(recipe, changed)
    elif level.compensation.keys() - changed.keys() - {"compensate.kind"}:
        why = "does not compensate" if chosen.compensate.kind == "none" else "has changes of compensation of its own"
        _log.warning("effort %s leaves recipe '%s' as it is, which %s", name, chosen.name, why)
    if gathers and name != EFFORT and chosen.needs_statistics:
        given = {"samples": level.samples, **given}
    return changed, given


def _value(recipe: Recipe, key: str) -> Any:
    part, name = key.split(".")
    return getattr(getattr(recipe, part), name)


def _check_format(recipe: Recipe, plan: Plan) -> None:
    """Raises CheckpointError where the recipe's format has no place for what the plan says."""
    if recipe.quantize.plain:
        one_grid({name: (row.form, row.spec) for name, row in plan.linears.items() if row.form != DENSE})


def gathered(recipe: Recipe, samples: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a calibration for a recipe: gradients and curvature as it needs them, if nothing else is said."""
    return {"gradients": recipe.needs_gradients, "curvature": recipe.needs_curvature, **samples}
