"""Models that are no more than shapes and spectra, and the bytes of their plans."""

import torch
from hypothesis import strategies as st
from spectrim.plan.allocate import Choice, choice

from spectrim.linear import Linear
from spectrim.recipe import AllocationPart


def linear(number: int, out: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Linear:
    return Linear(f"l{number}", "backbone", None, "proj", out, size, None, dtype)


def spectrum(size: int, seed: int) -> torch.Tensor:
    values = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    return values.sort(descending=True).values


@st.composite
def models(draw: st.DrawFn) -> dict[str, tuple[Linear, torch.Tensor]]:
    """Linears of a few shapes and dtypes with spectra; some are silent, and some have ties."""
    found = {}
    for number in range(draw(st.integers(1, 5))):
        out, size = draw(st.integers(1, 24)), draw(st.integers(1, 24))
        one = linear(number, out, size, draw(st.sampled_from([torch.bfloat16, torch.float32])))
        s = spectrum(min(out, size), draw(st.integers(0, 2**31)))
        s = {"as is": s, "zero": 0 * s, "ties": s.mul(4).ceil()}[draw(st.sampled_from(["as is", "zero", "ties"]))]
        found[one.name] = (one, s)
    return found


def options(model, rule: str) -> dict[str, Choice]:
    part = AllocationPart(rule=rule)
    return {name: choice(part, one, s, None) for name, (one, s) in model.items()}


def price(one: Linear, rank: int | None) -> int:
    """Bytes of a linear, counted from its shape."""
    item = torch.empty(0, dtype=one.dtype).element_size()
    return item * (one.out_features * one.in_features if rank is None else rank * (one.out_features + one.in_features))


def spent(model, ranks) -> int:
    return sum(price(one, ranks[name]) for name, (one, _) in model.items())


def least_and_dense(model) -> tuple[int, int]:
    least = sum(min(price(one, 1), price(one, None)) for one, _ in model.values())
    return least, sum(price(one, None) for one, _ in model.values())


PIVOTED_RULES = ("uniform", "global-sigma", "global-energy", "sensitivity", "loss-aware")


PivotedModel = list[tuple[Linear, torch.Tensor]]


@st.composite
def pivoted_models(draw: st.DrawFn, most: int = 24, linears: int = 4) -> PivotedModel:
    found: PivotedModel = []
    for number in range(draw(st.integers(1, linears))):
        out, size = draw(st.integers(1, most)), draw(st.integers(1, most))
        values = spectrum(min(out, size), draw(st.integers(0, 2**31)))
        flat = torch.ones_like(values)  # where only the pivoted_price falls
        values = {"as is": values, "flat": flat, "zero": 0 * values, "ties": values.mul(4).ceil()}[
            draw(st.sampled_from(["as is", "flat", "zero", "ties"]))
        ]
        one = linear(number, out, size, draw(st.sampled_from([torch.bfloat16, torch.float32])))
        found.append((one, values * draw(st.sampled_from([1.0, 3.0]))))
    return found


def pivoted_price(one: Linear, rank: int | None) -> int:
    """Bytes of the cheapest form, counted from the tensors of each."""
    item, out, size = one.dtype.itemsize, one.out_features, one.in_features
    if rank is None:
        return item * out * size
    return min(item * rank * (out + size), item * (rank * size + (out - rank) * rank) + 4 * rank)
