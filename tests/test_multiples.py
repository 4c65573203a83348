"""Ranks in multiples: budgets are neither broken nor wasted, and every factored linear has a round rank."""

from hypothesis import assume, given, settings
from hypothesis import strategies as st

import families
from compressed import logits, low_rank
from spectrim.allocate import choice, spend
from spectrim.pipeline import compress
from spectrim.recipe import AllocationPart
from test_allocate import price
from test_pivoted_plans import RULES, Model, models
from test_pivoted_plans import price as cheapest


def bought(model: Model, rule: str, budget: int, **options) -> dict[str, int | None]:
    part = AllocationPart(rule=rule)
    return spend({one.name: choice(part, one, s, s, **options) for one, s in model}, budget)


@settings(max_examples=200, deadline=None)
@given(models(), st.sampled_from(RULES), st.integers(1, 9), st.booleans(), st.floats(0, 1))
def test_ranks_are_multiples_within_the_budget(model, rule, multiple, pivoted, share):
    of = cheapest if pivoted else price
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


@settings(max_examples=100, deadline=None)
@given(models(), st.sampled_from(RULES), st.booleans(), st.floats(0, 1))
def test_multiples_of_one_are_all_ranks(model, rule, pivoted, share):
    of = cheapest if pivoted else price
    least = sum(min(of(one, 1), price(one, None)) for one, _ in model)
    dense = sum(price(one, None) for one, _ in model)
    assume(least <= dense)
    budget = int(least + share * (dense - least))
    assert bought(model, rule, budget, multiple=1, pivoted=pivoted) == bought(model, rule, budget, pivoted=pivoted)


def test_a_model_with_round_ranks():
    changes = {"storage.multiple": 8}
    small = compress(families.FAMILIES["llama"](), recipe="svd", retain=0.6, changes=changes)
    ranks = [layer.rank for layer in low_rank(small).values()]
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)
    plain = compress(families.FAMILIES["llama"](), recipe="svd", retain=0.6)
    assert any(layer.rank % 8 for layer in low_rank(plain).values())
    assert logits(small).isfinite().all()
