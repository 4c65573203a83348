"""How linears choose their storage: against every choice, against what is stored, and from end to end."""

import itertools
import json

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from spectrim.plan.hybrid import FEED_FORWARD, Option, alike, cheapest
from spectrim.storage.make import gram, refit

import families
from compressed import config_of, logits
from helpers.matrices import metric, normal
from helpers.samples import word_tokenizer
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.checkpoint import load, read_provenance
from spectrim.errors import BudgetError, RecipeError
from spectrim.maths.rounding import error
from spectrim.metrics.metric import layer_metric
from spectrim.pipeline import compress, compression
from spectrim.plan.plan import Integers, Plan, plan_row
from spectrim.recipe import Recipe
from spectrim.storage.packed import PackedLinear

# ---- one price of a byte ----


@st.composite
def menus(draw: st.DrawFn) -> dict[str, list[Option]]:
    whole = st.integers(1, 30)
    pairs = st.lists(st.tuples(whole, whole), min_size=1, max_size=6)
    return {
        f"l{n}": [Option(None, None, size, float(cost)) for size, cost in draw(pairs)]
        for n in range(draw(st.integers(1, 4)))
    }


def plans(menu: dict[str, list[Option]]) -> list[tuple[int, float]]:
    return [(sum(o.bytes for o in plan), sum(o.cost for o in plan)) for plan in itertools.product(*menu.values())]


@settings(max_examples=300, deadline=None)
@given(menus(), st.floats(0, 1))
def test_no_choice_is_much_better(menu, share):
    every = plans(menu)
    low, high = min(size for size, _ in every), max(size for size, _ in every)
    budget = int(low + share * (high - low))
    chosen = cheapest(menu, budget)
    assert chosen.keys() == menu.keys()
    assert sum(option.bytes for option in chosen.values()) <= budget
    cost, best = sum(o.cost for o in chosen.values()), min(cost for size, cost in every if size <= budget)
    # The gap of a Lagrangian is at most one step of one linear.
    largest = max(max(o.cost for o in found) - min(o.cost for o in found) for found in menu.values())
    assert best <= cost <= best + largest + 1e-9


@settings(max_examples=200, deadline=None)
@given(menus())
def test_enough_bytes_buy_the_least_cost_and_too_few_are_refused(menu):
    every = plans(menu)
    chosen = cheapest(menu, max(size for size, _ in every))
    assert sum(o.cost for o in chosen.values()) == min(cost for _, cost in every)
    least = min(size for size, _ in every)
    cheapest(menu, least)
    with pytest.raises(BudgetError, match=f"less than the {least} of the smallest options"):
        cheapest(menu, least - 1)


@settings(max_examples=300, deadline=None)
@given(menus(), st.floats(0, 1), st.booleans())
def test_no_bytes_are_left_that_would_save_cost(menu, share, even):
    least, most = (sum(end(o.bytes for o in found) for found in menu.values()) for end in (min, max))
    budget = int(least + share * (most - least))
    dense = {name: 31 + len(found) for name, found in menu.items()}
    chosen = alike(menu, dense, budget) if even else cheapest(menu, budget)
    left = budget - sum(option.bytes for option in chosen.values())
    assert left >= 0
    for name, found in menu.items():
        assert chosen[name] in found
        steps = [option.bytes - chosen[name].bytes for option in found if option.cost < chosen[name].cost]
        assert left < min(steps, default=budget + 1)


def test_one_retention_for_all_looks_at_no_cost_of_others():
    """The second linear has next to nothing to lose, and gets the bytes of the first all the same."""
    menu = {
        f"l{n}": [Option(None, None, size, scale / size) for size in range(2, 21, 2)]
        for n, scale in enumerate((1.0, 1e-6))
    }
    for budget in (8, 16, 24, 36):
        chosen = alike(menu, {"l0": 20, "l1": 20}, budget)
        assert [option.bytes for option in chosen.values()] == [budget // 2] * 2


def test_what_the_hull_leaves_buys_what_lies_off_it():
    """The next vertex costs 9 bytes; of the 5 that are left, 4 buy a point above the hull."""
    sizes = [(10, 8.0), (14, 7.0), (19, 0.0)]
    menu = {"l0": [Option(None, None, *each) for each in sizes]}
    assert [cheapest(menu, budget)["l0"].bytes for budget in (10, 13, 15, 18, 19)] == [10, 10, 14, 14, 19]


@settings(max_examples=200, deadline=None)
@given(menus(), st.floats(0, 1))
def test_one_retention_for_all(menu, share):
    """Every linear has at least what the largest common retention that can be paid gives it."""
    dense = {name: 31 + 3 * number for number, name in enumerate(menu)}
    least, most = (sum(end(o.bytes for o in found) for found in menu.values()) for end in (min, max))
    budget = int(least + share * (most - least))

    def best(retention: float) -> dict[str, Option]:
        smallest = {name: min(o.bytes for o in found) for name, found in menu.items()}
        return {
            name: min((o for o in found if o.bytes <= max(retention * dense[name] + 1e-9, smallest[name])),
                      key=lambda o: o.cost) for name, found in menu.items()
        }  # fmt: skip

    every = [best(share) for share in sorted({0, *(o.bytes / dense[n] for n, found in menu.items() for o in found)})]
    paid = [found for found in every if sum(option.bytes for option in found.values()) <= budget]
    chosen = alike(menu, dense, budget)
    assert all(chosen[name].cost <= paid[-1][name].cost for name in menu)
    with pytest.raises(BudgetError, match=f"less than the {least} of the smallest options; raise --retain"):
        alike(menu, dense, least - 1)


# ---- refit ----


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**31), st.sampled_from(["full", "thin", "diagonal", "none"]))
def test_a_refit_is_least_squares_and_never_raises_the_error(k, seed, kind):
    W, A, B = normal(12, 16, seed=seed), normal(12, k, seed=seed + 1), normal(k, 16, seed=seed + 2)
    X = normal(5 if kind == "thin" else 40, 16, seed=seed + 3)
    C = {"none": None, "diagonal": X.square().sum(0)}.get(kind, X.T @ X)
    found = refit(W, A, B, C)
    G = metric(12, seed=seed + 4)
    for M in (None, G):
        assert error(W - found @ B, C, M) <= error(W - A @ B, C, M) * (1 + 1e-9) + 1e-9
    # Orthogonal to all that A can reach.
    torch.testing.assert_close(gram(B, C) @ (found - A).T, ((W - A @ B) if C is None else (W - A @ B) * C if C.ndim == 1
        else (W - A @ B) @ C).matmul(B.T).T, rtol=1e-6, atol=1e-6)  # fmt: skip


# ---- whole models ----


@pytest.fixture(scope="module")
def statistics(words, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    path = tmp_path_factory.mktemp("statistics")
    reader = word_tokenizer(begins=False)  # of so few tokens, four that are alike would weigh too much
    options = {"processor": reader, "text": words, "samples": 4, "seqlen": 12}
    return calibrate(families.FAMILIES["llama"](), path / "s", **options, curvature=True)


def kind(row) -> str:
    if row.integers is None:
        return "dense" if row.rank is None else "factors"
    return "residual" if row.integers.residual else "integers" if row.rank is None else "integer factors"


def stored_bytes(directory, plan: Plan) -> int:
    """Of the compressible linears, in the file; biases not counted."""
    tensors = load_file(directory / "model.safetensors")
    return sum(
        tensor.nbytes
        for key, tensor in tensors.items()
        if any(key.startswith(f"{name}.") for name in plan.linears) and not key.endswith(".bias")
    )


@pytest.mark.parametrize(
    ("recipe", "retain", "changes"),
    [
        ("jw-svd+gptq", 0.2, {}),
        ("svd", 0.25, {"quantize.bits": 4, "quantize.symmetric": False, "quantize.group": 32}),
        ("curvature+gptq", 0.3, {}),
        ("curvature+gptq", 0.15, {"quantize.method": "rtn"}),
        ("laser+gptq", 0.4, {}),
        ("asvd", 0.3, {"quantize.bits": 8}),
        ("curvature+gptq", 0.6, {"storage.pivoted": True}),
    ],
)
def test_from_end_to_end(recipe, retain, changes, statistics, tmp_path):
    families.FAMILIES["llama"]().save_pretrained(tmp_path / "dense")
    dense = load(tmp_path / "dense")
    parts = anatomy(dense)
    before = logits(dense)
    options = {"recipe": recipe, "changes": changes}
    small = compress(dense, tmp_path / "small", stats=statistics, retain=retain, **options)
    loaded = load(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(small))
    plan = Plan.read(tmp_path / "small" / "plan.json", parts)
    assert any(row.integers is not None for row in plan.linears.values())
    assert plan.bytes <= retain * plan.dense_bytes
    assert stored_bytes(tmp_path / "small", plan) == plan.bytes
    record = read_provenance(tmp_path / "small")
    assert record["retention"]["bytes"] == plan.bytes / plan.dense_bytes
    assert "inner" in config_of(tmp_path / "small")["quantization_config"]
    if recipe == "laser+gptq":
        roles = {x.role for x in parts.linears if plan.linears[x.name].integers is not None}
        assert roles <= set(FEED_FORWARD)
    # The plan, obeyed again, gives the same model, and the dense one comes back after the block.
    model = load(tmp_path / "dense")
    with compression(model, recipe, stats=statistics, changes=changes) as prepared:
        with prepared.applied(plan) as again:
            assert torch.equal(logits(again), logits(small))
        assert torch.equal(logits(model), before)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_predicted_losses_are_those_of_what_is_stored(tmp_path):
    """On samples that see every direction many times, where damping is next to nothing."""
    model = families.FAMILIES["llama"]()
    (tmp_path / "words.txt").write_text(" ".join(f"w{(7 * i * i + 3 * i * (i % 13)) % 115 + 2}" for i in range(2000)))
    options = {"processor": word_tokenizer(), "text": str(tmp_path / "words.txt"), "samples": 40, "seqlen": 24}
    many = calibrate(model, tmp_path / "s", **options, curvature=True)
    with compression(model, "curvature+gptq", stats=many, changes={"quantize.damping": 0.01}) as prepared:
        ratios = {}
        for linear in prepared.parts.linears[:7]:
            W = model.get_submodule(linear.name).weight.detach().double()
            _, C, G = prepared.hybrid._metrics(linear, W)
            for option in prepared.hybrid.options(linear)[::2]:
                row = plan_row(linear, option.rank, integers=option.integers)
                assert option.bytes == row.bytes
                if option.integers is None:
                    continue
                reached = error(W - prepared.hybrid.stored(linear, row).weight(), C, G)
                ratios.setdefault(kind(row), []).append(reached / option.cost)
    assert ratios.keys() == {"integers", "integer factors", "residual"}
    for found in ratios.values():
        low, middle, high = torch.tensor(found).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        assert 0.6 < low < high < 1.3
        assert 0.85 < middle < 1.15


def test_less_loss_than_any_part_alone(statistics):
    """At every budget the hybrid predicts no more than any one kind of storage does."""
    model = families.FAMILIES["llama"]()
    with compression(model, "curvature+gptq", stats=statistics) as prepared:
        linears = prepared.parts.linears
        menu = {linear.name: prepared.hybrid.options(linear) for linear in linears}
        kinds: dict[object, dict[str, list[Option]]] = {}
        for name, found in menu.items():
            for option in found:
                bits = option.integers and (option.integers.bits, option.integers.residual)
                kinds.setdefault((option.rank is None, bits), {}).setdefault(name, []).append(option)
        steps = max(max(o.cost for o in found) for found in menu.values())
        compared = 0
        for retain in (0.16, 0.2, 0.25, 0.4, 0.6):
            plan = prepared.plan(retain)
            for alone in kinds.values():
                budget = int(retain * plan.dense_bytes)
                if alone.keys() != menu.keys() or sum(min(o.bytes for o in x) for x in alone.values()) > budget:
                    continue
                compared += 1
                assert plan.loss <= sum(o.cost for o in cheapest(alone, budget).values()) + 1e-12 * steps
        assert compared > 10
        losses = [prepared.plan(retain).loss for retain in (0.1, 0.2, 0.3, 0.5, 0.8, 1.0)]
        assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("recipe", ["curvature+gptq", "jw-svd+gptq"])
def test_errors_of_rows_are_shares_of_what_a_linear_has(recipe, statistics):
    model = families.FAMILIES["llama"]()
    with compression(model, recipe, stats=statistics) as prepared:
        plan, compared = prepared.plan(0.12), 0
        for linear in prepared.parts.linears:
            row, W = plan.linears[linear.name], model.get_submodule(linear.name).weight.detach().double()
            metric = layer_metric(prepared.recipe.metric, linear, statistics)
            G = None if metric.output is None else metric.output.dense(len(W))
            whole, reached = (error(E, metric.value, G) for E in (W, W - prepared._stored(linear.name, row).weight()))
            if row.loss is not None:
                assert row.error == pytest.approx(row.loss / whole, rel=1e-6)
            compared += 0.2 < reached / whole / row.error < 5
    assert compared > 0.7 * len(prepared.parts.linears)


def test_feedback_in_the_metric_beats_rounding_to_nearest(statistics):
    model = families.FAMILIES["llama"]()
    found = {}
    for method in ("gptq", "rtn"):
        changes = {"quantize.method": method, "quantize.bits": 4}
        with compression(model, "curvature+gptq", stats=statistics, changes=changes) as prepared:
            plan = prepared.plan(0.12)
            assert any(kind(row) == "integer factors" for row in plan.linears.values())
            found[method] = prepared.predicted(plan)["text"]
    assert found["gptq"] < found["rtn"]


def test_integers_that_are_no_smaller_leave_the_weight_dense():
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 2,
    }
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes)).bfloat16()
    with compression(model, "svd", changes={"quantize.bits": 8}) as prepared:
        plan = prepared.plan(0.9)
        for linear in prepared.parts.linears:
            options, tiny = prepared.hybrid.options(linear), linear.role in ("k", "v")  # [2, 8]: 32 bytes, or 36
            assert (options[0].rank, options[0].integers) == (None, None) if tiny else options[0].integers is not None
            assert all(option.bytes <= linear.nbytes for option in options)
            assert (plan.linears[linear.name].integers is None) == tiny


def test_plans_of_integers_are_checked(tmp_path):
    model = families.FAMILIES["llama"]()
    parts = anatomy(model)
    one = parts.linears[0]
    rows = {x.name: plan_row(x, None) for x in parts.linears}
    path = tmp_path / "plan.json"

    def read(rank, pivoted=False, **integers):
        content = json.loads(Plan(recipe="svd", linears=rows).json())
        content["linears"][one.name] |= {"rank": rank, "pivoted": pivoted, "integers": integers}
        path.write_text(json.dumps(content))
        return Plan.read(path, parts).linears[one.name]

    assert read(None, bits=4).bytes < read(None, bits=8).bytes < one.nbytes
    assert read(5, bits=None, residual=3).integers == Integers(residual=3)
    for rank, wrong in ((None, {"residual": 4, "bits": 4}), (None, {}), (5, {}), ([3] * 4, {"bits": 4})):
        with pytest.raises(BudgetError, match=f"gives '{one.name}' integers, but"):
            read(rank, **wrong)
    with pytest.raises(BudgetError, match="without pivots"):
        read(5, pivoted=True, bits=4)
    with pytest.raises(BudgetError, match="no plan that can be read"):
        read(None, bits=9)


@pytest.mark.parametrize(
    "changes",
    [{"compensate.kind": "adacomp"}, {"quantize.bits": 5}, {"quantize.group": 48}],
)
def test_recipes_that_cannot_be(changes):
    with pytest.raises(RecipeError, match=r"no integers|quantize"):
        Recipe.read("jw-svd+gptq", changes)


def test_rules_that_cannot_compare_are_refused():
    with (
        compression(
            families.FAMILIES["llama"](), "svd", changes={"quantize.bits": 4, "allocation.rule": "global-sigma"}
        ) as prepared,
        pytest.raises(RecipeError, match="cannot compare integers with factors"),
    ):
        prepared.plan(0.2)
