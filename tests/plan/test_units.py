"""MLPs that lose units: which linears they are, and their options as one row of the allocation."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import families
from helpers.problems import problem
from spectrim.anatomy import anatomy
from spectrim.linear import Linear
from spectrim.plan.options import menu
from spectrim.plan.spend import Curve, spend
from spectrim.plan.units import Units, units_of
from spectrim.recipe import StoragePart
from spectrim.storage import form

NAMES = ("mlp.gate", "mlp.up", "mlp.down")


def menus():
    storage = StoragePart(narrow=True)
    found = {}
    for seed, name in enumerate(NAMES):
        shape = (8, 24) if name.endswith("down") else (24, 8)
        case = problem(*shape, seed=seed, storage=storage, role=name.partition(".")[2], decay=0.3)
        found[name] = menu(case)
    return found


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


def test_options_of_an_mlp_are_those_of_its_linears_together() -> None:
    units = Units({NAMES[2]: NAMES[:2]}, menus())
    curves = {name: Curve(m.bytes, m.error) for name, m in units.menus.items()}
    (joined,) = units.joined(curves).values()
    narrow = 0
    for at in range(len(joined.bytes)):
        numbers = units.each({NAMES[2]: at})
        assert numbers.keys() == set(NAMES)
        assert joined.bytes[at] == sum(curves[name].bytes[n] for name, n in numbers.items())
        assert joined.cost[at] == pytest.approx(sum(curves[name].cost[n] for name, n in numbers.items()))
        options = {name: units.menus[name].option(n) for name, n in numbers.items()}
        kinds = [kind for kind, _ in options.values()]
        assert kinds.count("narrow") in (0, 3)
        if "narrow" in kinds:
            narrow += 1
            assert {count for _, spec in options.values() for count in spec.values()} == {
                options[NAMES[2]][1]["inputs"]
            }
        for name, (kind, spec) in options.items():
            assert form(kind).nbytes(units.menus[name].linear, spec) == units.menus[name].bytes[numbers[name]]
    assert narrow == sum(len(part.bytes) for part in units.menus[NAMES[2]].parts if part.form == "narrow") > 9


def test_no_combination_beats_the_common_hull() -> None:
    """At the vertices of the hull there is nothing better, among all combinations of factors and all widths."""
    units = Units({NAMES[2]: NAMES[:2]}, menus())
    curves = {name: Curve(m.bytes, m.error) for name, m in units.menus.items()}
    (joined,) = units.joined(curves).values()
    apart = [[n for n in range(len(m.bytes)) if m.option(n)[0] != "narrow"] for m in units.menus.values()]
    every = [
        (sum(c.bytes[n] for c, n in zip(curves.values(), some, strict=True)),
         sum(c.cost[n] for c, n in zip(curves.values(), some, strict=True)))
        for some in product(*apart)
    ]  # fmt: skip
    sizes, costs = np.array(every).T
    for size, cost in zip(
        joined.bytes[joined.front[joined.chain]], joined.cost[joined.front[joined.chain]], strict=True
    ):
        assert cost <= costs[sizes <= size].min(initial=np.inf) * (1 + 1e-9) + 1e-15
    assert joined.bytes[spend([joined], 1000)[0]] <= 1000
