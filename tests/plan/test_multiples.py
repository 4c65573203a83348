"""Ranks in multiples: budgets are neither broken nor wasted, and every factored linear has a round rank."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spectrim.plan.allocate import choice, spend

import families
from compressed import logits, low_rank
from helpers.plans import PIVOTED_RULES, PivotedModel, pivoted_models, pivoted_price, price
from spectrim.errors import BudgetError
from spectrim.pipeline import compress, compression
from spectrim.pipeline.stages import Compression
from spectrim.recipe import AllocationPart


def bought(model: PivotedModel, rule: str, budget: int, **options) -> dict[str, int | None]:
    part = AllocationPart(rule=rule)
    return spend({one.name: choice(part, one, s, s, **options) for one, s in model}, budget)


@settings(max_examples=200, deadline=None)
@given(pivoted_models(), st.sampled_from(PIVOTED_RULES), st.integers(1, 9), st.booleans(), st.floats(0, 1))
def test_ranks_are_multiples_within_the_budget(model, rule, multiple, pivoted, share):
    of = pivoted_price if pivoted else price
    dense = sum(price(one, None) for one, _ in model)
    steps = {one.name: [k for k in range(multiple, len(s) + 1, multiple) if of(one, k) < price(one, None)]
             for one, s in model}  # fmt: skip
    least = sum(of(one, steps[one.name][0]) if steps[one.name] else price(one, None) for one, _ in model)
    budget = int(least + share * (dense - least))
    ranks = bought(model, rule, budget, multiple=multiple, pivoted=pivoted)
    left = budget - sum(of(one, ranks[one.name]) for one, _ in model)
    assert left >= 0
    for one, _ in model:
        rank = ranks[one.name]
        if rank is None:
            continue
        assert rank in steps[one.name]
        following = [k for k in steps[one.name] if k > rank]
        after = of(one, following[0]) if following else price(one, None)
        assert left < after - of(one, rank)


def test_a_model_with_round_ranks():
    changes = {"storage.multiple": 8}
    small = compress(families.FAMILIES["llama"](), recipe="svd", retain=0.6, changes=changes)
    ranks = [layer.rank for layer in low_rank(small).values()]
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)
    plain = compress(families.FAMILIES["llama"](), recipe="svd", retain=0.6)
    assert any(layer.rank % 8 for layer in low_rank(plain).values())
    assert logits(small).isfinite().all()


# ---- with integers ----


@functools.cache
def prepared(family: str, rule: str, multiple: int, bits: int | str, pivoted: bool, roles: str) -> Compression:
    changes = {"allocation.rule": rule, "storage.multiple": multiple, "storage.pivoted": pivoted}
    changes |= {"quantize.bits": bits, "quantize.group": 32, "quantize.roles": roles}
    with compression(families.FAMILIES[family](), "svd", changes=changes) as found:
        found.plan(1.0)  # all options, while their spectra are there
        return found


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["llama", "llava"]),
    st.sampled_from(["uniform", "global-energy"]),
    st.sampled_from([1, 3, 8, 16, 24, 64, 1000]),
    st.sampled_from([2, 4, 8, "auto"]),
    st.booleans(),
    st.sampled_from(["all", "feed-forward"]),
    st.floats(0, 1),
)
def test_integers_and_multiples_within_the_budget(family, rule, multiple, bits, pivoted, roles, share):
    found = prepared(family, rule, multiple, bits, pivoted, roles)
    menu = {one.name: found.hybrid.options(one) for one in found.parts.linears}
    for options in menu.values():
        assert options
        assert all(option.rank is None or option.rank % multiple == 0 for option in options)
    least = sum(min(option.bytes for option in options) for options in menu.values())
    dense = sum(one.nbytes for one in found.parts.linears)
    retain = (least + share * (dense - least) + 0.5) / dense
    plan = found.plan(min(1.0, retain))
    left = int(plan.retain * dense) - plan.bytes
    assert left >= 0
    for name, options in menu.items():
        row = plan.linears[name]
        assert row.rank is None or row.rank % multiple == 0
        now = next(o for o in options if (o.rank, o.integers, o.pivoted) == (row.rank, row.integers, row.pivoted))
        assert row.bytes == now.bytes
        assert left < min((o.bytes - now.bytes for o in options if o.cost < now.cost), default=left + 1)
    with pytest.raises(BudgetError, match=f"less than the {least} of the smallest options"):
        found.plan((least - 0.5) / dense)


def test_a_model_with_round_ranks_of_integers():
    changes = {"storage.multiple": 16, "quantize.bits": 4, "quantize.group": 32}
    small = compress(families.FAMILIES["llama"](), recipe="svd", retain=0.09, changes=changes)
    ranks = [layer.rank for layer in low_rank(small).values()]
    assert ranks
    assert all(rank % 16 == 0 for rank in ranks)
    plain = compress(families.FAMILIES["llama"](), recipe="svd", retain=0.09, changes=changes | {"storage.multiple": 1})
    assert any(layer.rank % 16 for layer in low_rank(plain).values())
    assert logits(small).isfinite().all()
