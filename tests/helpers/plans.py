"""Linears that are no more than shapes and spectra, what their options take and lose, and models of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from spectrim.linear import Linear
from spectrim.maths.decompose import Spectrum
from spectrim.plan.options import Menu, menu
from spectrim.plan.rules import curve
from spectrim.plan.spend import Curve, spend
from spectrim.recipe import AllocationPart, QuantizePart, StoragePart
from spectrim.storage import Problem

RULES = ("uniform", "adacr", "global-sigma", "global-sigma-mean", "global-energy", "sensitivity", "loss-aware")
THRESHOLDS = ("global-sigma", "global-sigma-mean", "sensitivity")
Model = list[Problem]


def linear(number: int, out: int, size: int, dtype: torch.dtype = torch.bfloat16, heads: int = 1) -> Linear:
    role, apart = ("q", heads) if heads > 1 else ("proj", None)
    return Linear(f"l{number}", "backbone", None, role, out, size, apart, dtype)


def spectrum(size: int, seed: int) -> torch.Tensor:
    values = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    return values.sort(descending=True).values


def shaped(one: Linear, s: torch.Tensor, *, pivoted: bool = False, multiple: int = 1) -> Problem:
    """A linear of which only the spectrum is known: s [m], or [heads, m / heads] by head, each head's largest first."""
    head = None
    if s.ndim == 2:
        first = torch.zeros_like(s)
        first[:, 0] = torch.inf
        order = (s + first).flatten().argsort(descending=True, stable=True)
        head, s = torch.arange(len(s)).repeat_interleave(s.shape[1])[order], s.flatten()[order]

    def unknown() -> Any:
        raise AssertionError("factors of floats need no weight and no metric")

    storage = StoragePart(pivoted=pivoted, multiple=multiple)
    kept = Spectrum(s, torch.empty(0), head=head)
    return Problem(one, unknown, unknown, storage, QuantizePart(), heads=kept.heads, kept=kept)


@st.composite
def models(draw: st.DrawFn, least: int = 1, most: int = 24, linears: int = 4) -> Model:
    """Linears of `least` to `most` inputs and outputs; some are silent, have ties, are flat, or are factored by head.

    All are stored alike: with or without pivots, in multiples or not.
    """
    storage = {"pivoted": draw(st.booleans()), "multiple": draw(st.sampled_from([1, 1, 2, 3, 8]))}
    found = []
    for number in range(draw(st.integers(1, linears))):
        apart = draw(st.sampled_from([1, 1, 2, 3]))
        out = apart * draw(st.integers(-(-least // apart), most // apart))
        size = draw(st.integers(least, most))
        one = linear(number, out, size, draw(st.sampled_from([torch.bfloat16, torch.float32])), apart)
        parts = []
        for _ in range(apart):
            s = spectrum(min(out // apart, size), draw(st.integers(0, 2**31)))
            kind = draw(st.sampled_from(["as is", "as is", "flat", "zero", "ties"]))
            parts.append({"as is": s, "flat": torch.ones_like(s), "zero": 0 * s, "ties": s.mul(4).ceil()}[kind])
        s = torch.stack(parts) if apart > 1 else parts[0]
        found.append(shaped(one, s * draw(st.sampled_from([1.0, 3.0])), **storage))
    return found


def values(rule: str, problem: Problem) -> torch.Tensor:
    """What a threshold is put to, by direction; losses of truncations never rise."""
    s = problem.spectrum.s
    return s.flip(0).cummax(0).values.flip(0) if rule == "sensitivity" else s.sqrt()


def menus(model: Model) -> list[Menu]:
    return [menu(problem) for problem in model]


def curves(model: Model, rule: str, shares: Sequence[float] = (), floor: float = 0.0) -> list[Curve]:
    """The options of a model as a rule scores them; `shares` are the importances of adacr, all 1 by default."""
    part = AllocationPart(rule=rule, floor=floor)
    found = []
    for number, (problem, offered) in enumerate(zip(model, menus(model), strict=True)):
        wanted: Any = values(rule, problem) if rule in THRESHOLDS else None
        if rule == "adacr":
            wanted = float(shares[number]) if shares else 1.0
        found.append(curve(part, offered, wanted))
    return found


def bought(model: Model, rule: str, budget: int, **options: Any) -> list[int | None]:
    """The rank of each linear, those of heads added up, None for dense."""
    found = []
    for offered, number in zip(menus(model), spend(curves(model, rule, **options), budget), strict=True):
        form, spec = offered.option(number)
        rank = spec.get("rank")
        assert (form == "dense") == (rank is None)
        found.append(sum(rank) if isinstance(rank, list) else rank)
    return found


# ---- counted from the shapes ----


def price(problem: Problem, rank: int | None) -> int:
    """Bytes of the smallest tensors that hold a rank; of pivots as many int32 as there are directions."""
    one = problem.linear
    item, out, size = one.dtype.itemsize, one.out_features, one.in_features
    if rank is None:
        return item * out * size
    plain = item * rank * (size + out // problem.heads)
    by_pivots = item * (rank * size + (out - rank) * rank) + 4 * rank
    return min(plain, by_pivots) if problem.storage.pivoted and problem.heads == 1 else plain


def choices(problem: Problem) -> list[int | None]:
    """The ranks that are smaller than the dense weight, and that, by rising bytes."""
    step, m = (problem.storage.multiple if problem.heads == 1 else 1), len(problem.spectrum.s)
    first = step if problem.heads == 1 else problem.heads
    return [*(k for k in range(first, m + 1, step) if price(problem, k) < price(problem, None)), None]


def lost(problem: Problem, rank: int | None) -> float:
    """Error of a rank."""
    return 0.0 if rank is None else float(problem.spectrum.s[rank:].sum())


def owed(rule: str, problem: Problem, rank: int | None) -> float:
    """What a rank costs under a rule that adds up costs.

    Under a threshold: value times bytes of the directions that are left out, up to the one that the dense weight
    replaces.
    """
    if rank is None:
        return 0.0
    if rule == "loss-aware":
        return lost(problem, rank)
    if rule == "global-energy":
        return lost(problem, rank) / max(lost(problem, 0), 1e-300)
    each = values(rule, problem)
    if problem.heads > 1:
        each = torch.cat([each[: problem.heads], each[problem.heads :].cummin(0).values])
    useful = [k for k in choices(problem) if k is not None and lost(problem, k) > 0]
    last = max(useful, default=0) + 1
    return sum(float(each[k]) * (price(problem, k + 1) - price(problem, k)) for k in range(rank, min(last, len(each))))


def spent(model: Model, ranks: Sequence[int | None]) -> int:
    return sum(price(problem, rank) for problem, rank in zip(model, ranks, strict=True))


def least_and_dense(model: Model) -> tuple[int, int]:
    return sum(price(x, choices(x)[0]) for x in model), sum(price(x, None) for x in model)


def between(ends: tuple[int, int], share: float) -> int:
    """A budget between two others."""
    return int(ends[0] + share * (ends[1] - ends[0]))


def totals(model: Sequence[Curve], found: Sequence[int]) -> tuple[int, float]:
    """Bytes and cost of one option of each linear."""
    pairs = list(zip(model, found, strict=True))
    return sum(int(c.bytes[i]) for c, i in pairs), float(np.sum([c.cost[i] for c, i in pairs]))
