"""MLPs that lose units: which linears they are, and their options as one row of the allocation."""

import json
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import families
from helpers.matrices import normal
from helpers.problems import lost, problem
from spectrim.anatomy import anatomy
from spectrim.errors import BudgetError
from spectrim.linear import Linear
from spectrim.maths.removal import fitted
from spectrim.maths.rounding import Grid, conditional, expected
from spectrim.plan.options import menu
from spectrim.plan.plan import Plan, plan_row
from spectrim.plan.spend import Curve, spend
from spectrim.plan.units import Units, units_of
from spectrim.recipe import QuantizePart, StoragePart
from spectrim.storage import filled, form

NAMES = ("mlp.gate", "mlp.up", "mlp.down")


PARTS = {
    "floats": QuantizePart(),
    "any bits": QuantizePart(bits="auto", group=32),
    "3 bits": QuantizePart(bits=3, group=32),
}


def menus(quantize: QuantizePart, inner: int = 128):
    given = {"storage": StoragePart(narrow=True), "quantize": quantize, "decay": 0.3}
    down = problem(8, inner, seed=2, role="down", **given)
    others = [problem(inner, 8, seed=seed, role=role, **given) for seed, role in enumerate(("gate", "up"))]
    cases = (*(replace(case, units=lambda: down.removal) for case in others), down)
    return {name: menu(case) for name, case in zip(NAMES, cases, strict=True)}


def test_the_linears_of_an_mlp_are_found_where_nothing_else_has_parameters() -> None:
    model = families.FAMILIES["llava"]()
    parts = anatomy(model)
    found = units_of(parts.linears, model)
    assert {len(first) for first in found.values()} == {1, 2}  # fc1; gate and up
    assert {parts.linear(name).role for name in found} == {"fc2", "down"}
    reader = next(name for name in found if parts.linear(name).role == "down")
    model.get_submodule(reader.rpartition(".")[0]).norm = nn.LayerNorm(4)
    assert reader in units_of(parts.linears)
    assert reader not in units_of(parts.linears, model)
    wider = [
        Linear(x.name, x.place, x.block, x.role, x.out_features + 8, x.in_features, None, torch.float32)
        for x in parts.linears
    ]
    assert not units_of(wider)


class _Largest(nn.Module):
    """The activation of Gemma 3n's first layers: what is not above the mean of all units becomes zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x - x.mean(-1, keepdim=True))


def test_units_that_an_activation_mixes_are_left_alone() -> None:
    model = families.FAMILIES["llama"]()
    parts = anatomy(model)
    whole = units_of(parts.linears, model)
    reader, first = next(iter(whole.items()))
    mlp = model.get_submodule(reader.rpartition(".")[0])
    mlp.act_fn = _Largest()
    assert reader not in units_of(parts.linears, model)
    assert units_of(parts.linears, model).keys() == whole.keys() - {reader}
    assert not mlp.gate_proj._forward_hooks
    assert not mlp.down_proj._forward_pre_hooks
    for other in (lambda x, residual: x, lambda x: x, lambda x: x.missing):
        mlp.forward = other
        assert reader not in units_of(parts.linears, model)
    mlp.forward = lambda x: mlp.down_proj(input=torch.relu(mlp.gate_proj(input=x)) * mlp.up_proj(input=x))
    assert reader in units_of(parts.linears, model)
    with torch.device("meta"):
        assert units_of(parts.linears, type(model)(model.config)).keys() == whole.keys()
    rows = {name: plan_row(parts.linear(name), "narrow", {"outputs": 40}) for name in first}
    plan = Plan(recipe="spectrim", linears=rows | {reader: plan_row(parts.linear(reader), "narrow", {"inputs": 40})})
    plan.fitted(parts).check_outputs(whole)
    with pytest.raises(BudgetError, match=f"takes outputs from '{first[0]}', and something in its MLP needs all"):
        plan.fitted(parts).check_outputs({})


@pytest.mark.parametrize("quantize", PARTS)
def test_options_of_an_mlp_are_those_of_its_linears_together(quantize: str) -> None:
    units = Units({NAMES[2]: NAMES[:2]}, menus(PARTS[quantize]))
    curves = {name: Curve(m.bytes, m.error) for name, m in units.menus.items()}
    (joined,) = units.joined(curves).values()
    widths: Counter[int] = Counter()
    for at in range(len(joined.bytes)):
        numbers = units.each({NAMES[2]: at})
        assert numbers.keys() == set(NAMES)
        assert joined.bytes[at] == sum(curves[name].bytes[n] for name, n in numbers.items())
        assert joined.cost[at] == pytest.approx(sum(curves[name].cost[n] for name, n in numbers.items()))
        options = {name: units.menus[name].option(n) for name, n in numbers.items()}
        assert [kind for kind, _ in options.values()].count("narrow") in (0, 3)
        width, *others = {
            spec.get("inputs", spec.get("outputs")) for kind, spec in options.values() if kind == "narrow"
        } or {0}
        assert not others
        widths[width] += 1
        for name, (kind, spec) in options.items():
            assert form(kind).nbytes(units.menus[name].linear, spec) == units.menus[name].bytes[numbers[name]]
    assert len(widths) == {"floats": 50, "any bits": 50, "3 bits": 4}[quantize]  # indices cost bytes, too
    if quantize == "any bits":  # where integers are priced
        assert {width for width, count in widths.items() if count > 1 and width} == {32, 64, 96}


def test_a_linear_that_computes_units_keeps_them_where_the_reader_is_not_planned_for() -> None:
    found = menus(PARTS["any bits"])
    del found[NAMES[2]]
    units = Units({NAMES[2]: NAMES[:2]}, found)
    assert "narrow" in {part.form for m in found.values() for part in m.parts}
    assert "narrow" not in {part.form for m in units.menus.values() for part in m.parts}
    assert units.joined(curves := {name: Curve(m.bytes, m.error) for name, m in units.menus.items()}) == curves


@pytest.mark.parametrize("quantize", PARTS)
def test_no_combination_beats_the_common_hull(quantize: str) -> None:
    """At the vertices of the hull there is nothing better, among all options of one width together."""
    units = Units({NAMES[2]: NAMES[:2]}, menus(PARTS[quantize]))
    curves = {name: Curve(m.bytes, m.error) for name, m in units.menus.items()}
    (joined,) = units.joined(curves).values()
    by_width: list[dict[int, list[int]]] = []
    for m in units.menus.values():
        by_width.append({})
        for n in range(len(m.bytes)):
            kind, spec = m.option(n)
            by_width[-1].setdefault(next(iter(spec.values())) if kind == "narrow" else 0, []).append(n)
    every = [
        (sum(c.bytes[n] for c, n in zip(curves.values(), some, strict=True)),
         sum(c.cost[n] for c, n in zip(curves.values(), some, strict=True)))
        for width in by_width[0]
        for some in product(*(numbers[width] for numbers in by_width))
    ]  # fmt: skip
    sizes, costs = np.array(every).T
    for size, cost in zip(
        joined.bytes[joined.front[joined.chain]], joined.cost[joined.front[joined.chain]], strict=True
    ):
        assert cost <= costs[sizes <= size].min(initial=np.inf) * (1 + 1e-9) + 1e-15
    middle = int(joined.bytes[joined.front[0]] + joined.bytes[joined.front[-1]]) // 2
    assert joined.bytes[spend([joined], middle)[0]] <= middle


@pytest.mark.parametrize("role", ["gate", "down"])
def test_integers_of_every_width_are_priced_as_those_of_a_linear_of_that_size(role: str) -> None:
    given = {"storage": StoragePart(narrow=True), "quantize": PARTS["any bits"], "decay": 0.3}
    down = problem(8, 128, role="down", **given)
    case = down if role == "down" else replace(problem(128, 8, role=role, seed=1, **given), units=lambda: down.removal)
    options = form("narrow").options(case)
    prices = {json.dumps(options.spec(n)): options.error[n] for n in range(len(options.bytes))}
    side = "inputs" if role == "down" else "outputs"
    for count in (32, 64, 96):
        kept = down.removal.kept(count)
        W = fitted(case.W, kept, case.C) if role == "down" else case.W[kept]
        C, G = (case.C[kept][:, kept], case.G) if role == "down" else (case.C, case.G[kept][:, kept])
        for bits in (2, 8):
            grid = Grid(bits, 32 if role == "down" else None)
            weights = [conditional(M, len(M), W) for M in (C, G)]
            lost = float(expected(W.double(), grid, *weights, torch.float32).sum())
            lost += float(down.removal.error[128 - count]) if role == "down" else 0.0
            assert prices[json.dumps({side: count, "grid": grid.spec})] == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize("width", [24, 40, 56])
def test_widths_from_few_positions_cost_what_is_predicted(width: int) -> None:
    """Or less, as the prediction counts the dampening; the metric has a quarter of full rank, in float32."""
    X = normal(16, 64, seed=5)
    C = (X.T @ X / 16).float().double()
    many = problem(8, 64, role="down", storage=StoragePart(narrow=True))
    given = replace(many, metrics=lambda: (C, many.output), positions=(16, 16))
    narrow = form("narrow")
    offered = narrow.options(given)
    prices = {offered.spec(n)["inputs"]: offered.error[n] for n in range(len(offered.bytes))}
    made = filled(given.empty(), "narrow", {"inputs": width}, narrow.make(given, {"inputs": width}))
    assert 0.001 * prices[width] < lost(given, made.product().detach()) < 1.001 * prices[width]
