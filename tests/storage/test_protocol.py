"""What every form of storage keeps to, whoever wrote it; each that is registered is tested by its own options."""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.columns import Columns
from helpers.matrices import normal
from helpers.problems import lost, problem
from spectrim.errors import ModelError, NumericalError
from spectrim.lazy import LazyWeight
from spectrim.linear import Linear
from spectrim.maths.rounding import error
from spectrim.recipe import QuantizePart, StoragePart
from spectrim.storage import DENSE, Form, Problem, Spec, StoredLayer, base, filled, forms, made
from spectrim.storage import problem as problems_of_forms
from spectrim.storage.packed import PackedLinear

FORMS = (*(form.name for form in forms() if form.replaces is nn.Linear), "columns")
STORED = tuple(name for name in FORMS if name != DENSE)
RECIPES: dict[str, tuple[StoragePart, QuantizePart]] = {
    "floats": (StoragePart(), QuantizePart()),
    "pivots": (StoragePart(pivoted=True), QuantizePart()),
    "multiples": (StoragePart(multiple=8), QuantizePart()),
    "narrow": (StoragePart(narrow=True), QuantizePart()),
    "narrow, pivots": (StoragePart(narrow=True, pivoted=True), QuantizePart()),
    "narrow, any bits": (StoragePart(narrow=True), QuantizePart(bits="auto", group=32)),
    "narrow in 3 bits": (StoragePart(narrow=True), QuantizePart(bits=3, group=None, symmetric=False, damping=0.01)),
    "any bits": (StoragePart(), QuantizePart(bits="auto", group=32)),
    "zero points": (StoragePart(), QuantizePart(bits="auto", group=None, symmetric=False)),
    "multiples of integers": (StoragePart(multiple=8), QuantizePart(bits=4, group=32, damping=0.01)),
    "rotated": (StoragePart(narrow=True), QuantizePart(bits="auto", group=32, rotate=True)),
    "to nearest": (StoragePart(), QuantizePart(bits="auto", group=32, method="rtn")),
}
SHAPES = ((24, 32, 1), (40, 32, 1), (24, 20, 4))  # outputs, inputs, heads


@pytest.fixture(autouse=True)
def _other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form of somebody else is there, too."""
    monkeypatch.setitem(base._FORMS, "columns", Columns())
    monkeypatch.setattr(problems_of_forms, "_WORTH", torch.inf)  # random weights gain nothing by it


def problems(dtype: torch.dtype, metrics: str = "both", **how: Any) -> Iterator[Problem]:
    for (storage, quantize), (out, size, heads) in product(RECIPES.values(), SHAPES):
        parts = {"storage": storage, "quantize": quantize}
        yield problem(out, size, heads=heads, dtype=dtype, metrics=metrics, **parts, **how)


def some(name: str, dtype: torch.dtype = torch.float32) -> list[tuple[Problem, Spec]]:
    """Problems with an option that the form has there: the first, a middle or the last, in turns."""
    found: list[tuple[Problem, Spec]] = []
    for case in problems(dtype):
        options = base.form(name).options(case)
        if n := len(options.bytes):
            found.append((case, options.spec((0, n // 2, n - 1)[len(found) % 3])))
    assert len(found) > 2
    return found


def dense(linear: Linear, bias: bool = True, **like: Any) -> nn.Linear:
    return nn.Linear(linear.in_features, linear.out_features, bias, dtype=linear.dtype, **like).eval()


def layer_of(case: Problem, name: str, spec: Spec) -> Any:
    return filled(dense(case.linear), name, spec, made(case, name, spec))


def described(tensors: Any) -> dict[str, Any]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


# ---- options ----


@pytest.mark.parametrize("name", FORMS)
def test_bytes_and_numbers_are_those_of_the_tensors(name: str) -> None:
    form = base.form(name)
    for dtype in (torch.float32, torch.bfloat16):
        for case, spec in some(name, dtype):
            layer = form.build(dense(case.linear, device="meta"), spec)
            tensors = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
            assert form.nbytes(case.linear, spec) == sum(tensor.nbytes for tensor in tensors.values())
            floats = sum(parameter.numel() for name, parameter in layer.named_parameters() if name != "bias")
            packed = [part for part in layer.modules() if isinstance(part, PackedLinear)]
            integers = sum(part.in_features * part.out_features for part in packed)
            assert form.params(case.linear, spec) == floats + integers
            assert form.marker in tensors
            assert (name == DENSE) == ("weight" in tensors)


@pytest.mark.parametrize("name", FORMS)
def test_options_say_their_bytes_and_fit(name: str) -> None:
    form = base.form(name)
    for case in problems(torch.bfloat16):
        options = form.options(case)
        assert options.form == name
        assert options.bytes.shape == options.error.shape
        for number, (size, predicted) in enumerate(zip(options.bytes, options.error, strict=True)):
            spec = options.spec(number)
            assert json.loads(json.dumps(spec)) == spec
            form.check(case.linear, spec)
            assert form.heads(spec) in (None, case.heads)
            assert size == form.nbytes(case.linear, spec) >= form.least(case.linear, case.quantize)
            assert predicted >= 0


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("metrics", ["none", "diagonal", "inputs", "both"])
def test_the_predicted_error_is_that_of_what_is_made(name: str, metrics: str) -> None:
    """To rounding, or within a factor of two for errors fed on in metrics that damping changes little."""
    form, seen = base.form(name), 0
    for case in problems(torch.float64, metrics, floor=0.5):
        quantize = case.quantize.model_copy(update={"damping": 0.01})
        case, options = replace(case, quantize=quantize), form.options(case)
        if not (n := len(options.bytes)) or (form.searches and quantize.method == "rtn"):
            continue
        number = (0, n // 2, n - 1)[seen % 3]
        while form.searches and options.spec(number).get("rank") == len(case.left) - 1:
            number -= 1  # the re-fit of factors of full rank takes back more than half of the rounding
        spec, predicted = options.spec(number), float(options.error[number])
        layer: Any = filled(dense(case.linear), name, spec, made(case, name, spec))
        true, close = lost(case, layer.weight.detach()), {"rel": 1e-6, "abs": 1e-9 * case.left[0]}
        assert predicted / 2 < true < predicted * 2 if form.searches else true == pytest.approx(predicted, **close)
        seen += 1
    assert seen > 2


def test_a_recipe_decides_which_forms_have_options() -> None:
    def offered(role: str, **quantize: Any) -> set[str]:
        case = problem(quantize=QuantizePart(group=32, **quantize))
        linear = Linear("a", "backbone", None, role, 24, 32, None, torch.float32)
        case = Problem(linear, case.weight, case.metrics, case.storage, case.quantize)
        return {form.name for form in forms() if len(form.options(case).bytes)}

    floats, integers = {"dense", "low-rank", "columns"}, {"integers", "integer-factors"}
    assert offered("up") == offered("q", bits=4, roles="feed-forward") == floats
    assert offered("up", bits=4) == offered("up", bits=2, roles="feed-forward") == offered("q", bits=8) == integers
    assert offered("q", bits="auto") == floats | integers | {"integers+factors"}


# ---- layers ----


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.float16, 0.01), (torch.bfloat16, 0.1)]
)
@torch.no_grad()
def test_the_layer_computes_with_its_product(name: str, dtype: torch.dtype, close: float) -> None:
    for case, spec in some(name, dtype):
        layer = layer_of(case, name, spec)
        W = layer.product()
        assert (W.dtype, tuple(W.shape)) == (dtype, (case.linear.out_features, case.linear.in_features))
        ones = torch.eye(case.linear.in_features, dtype=dtype)
        y = layer(ones) - layer.bias
        assert float((y.T - W).double().norm()) <= close * float(W.double().norm())
        assert isinstance(layer.weight, LazyWeight)
        assert torch.equal(layer.weight + 0, W)
        plain = layer.to_dense()
        assert type(plain) is nn.Linear
        assert torch.equal(plain.weight, W)
        assert torch.equal(plain.bias, layer.bias)
        assert plain.bias is not layer.bias
        assert not plain.training
        wide = deepcopy(layer).double().product()
        assert float((wide - W).norm()) <= close * float(wide.norm())


@pytest.mark.parametrize("name", STORED)
def test_a_layer_says_how_to_build_it_again(name: str) -> None:
    for case, spec in some(name):
        layer: StoredLayer = layer_of(case, name, spec)
        assert layer.form == name
        spec = json.loads(json.dumps(layer.spec))
        base.form(name).check(case.linear, spec)
        again: Any = base.form(name).build(dense(case.linear), spec)
        assert again.spec == layer.spec
        assert repr(again) == repr(layer)
        assert described(layer.tensors()) == described(layer.expected()) == described(again.tensors())
        again.load_state_dict(layer.state_dict())
        again.loaded()
        x = normal(3, case.linear.in_features).float()
        assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("name", STORED)
def test_an_empty_layer_shows_in_its_output_and_takes_over_the_bias(name: str) -> None:
    for case, spec in some(name, torch.bfloat16):
        linear = dense(case.linear)
        linear.weight.requires_grad_(False)
        layer: Any = base.form(name).build(linear, spec)
        assert layer.bias is linear.bias
        assert layer.bias.requires_grad
        assert not any(parameter.requires_grad for parameter in layer.parameters() if parameter is not layer.bias)
        assert not any(module.training for module in layer.modules())
        assert {x.dtype for x in layer.state_dict().values() if x.is_floating_point()} == {torch.bfloat16}
        assert layer(torch.ones(2, case.linear.in_features, dtype=torch.bfloat16)).isnan().all()
        assert base.form(name).build(dense(case.linear, bias=False), spec).bias is None


@pytest.mark.parametrize("name", STORED)
def test_a_layer_on_the_meta_device_has_no_values(name: str) -> None:
    case, spec = some(name)[0]
    layer: Any = base.form(name).build(dense(case.linear, device="meta"), spec)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer.weight.is_meta
    for read in (layer.product, layer.to_dense):
        with pytest.raises(ModelError, match="meta device have no values; load the model without offloading"):
            read()


@pytest.mark.parametrize("name", STORED)
def test_tensors_of_another_layer_are_refused(name: str) -> None:
    case, spec = some(name)[0]
    tensors = dict(made(case, name, spec))
    with pytest.raises(ModelError, match=re.escape(f"not those of the form '{name}'")):
        filled(dense(case.linear), name, spec, tensors | {"A.0.colour": torch.ones(1)})
    tensors.popitem()
    with pytest.raises(ModelError, match=re.escape(f"not those of the form '{name}'")):
        filled(dense(case.linear), name, spec, tensors)


# ---- specs ----

CASES = cache(some)
JSON = st.none() | st.booleans() | st.integers(-2, 70) | st.sampled_from([0, 10**12, 0.5, "x", [], [0], [2, 3], {}])


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_spec_is_refused_or_can_be_made(name: str, data: st.DataObject) -> None:
    """One entry of a spec that fits, or of a grid in it, is replaced, left out, or added."""
    form = base.form(name)
    case, spec = data.draw(st.sampled_from(CASES(name)))
    spec = json.loads(json.dumps(spec))
    inside = [spec, *spec.get("grids", {}).values(), *([spec["grids"]] if "grids" in spec else [])]
    part = data.draw(st.sampled_from(inside))
    key = data.draw(st.sampled_from([*part, "colour", "A", "R"]))
    if data.draw(st.booleans()):
        part.pop(key, None)
    else:
        part[key] = data.draw(JSON)
    try:
        form.check(case.linear, spec)
    except ModelError:
        return
    heads = form.heads(spec)
    case = problem(
        case.linear.out_features, case.linear.in_features, heads=case.heads if heads is None else heads,
        quantize=case.quantize,
    )  # fmt: skip
    tensors = form.make(case, spec)
    assert form.nbytes(case.linear, spec) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", FORMS)
def test_an_entry_that_no_form_has_is_refused(name: str) -> None:
    case, spec = some(name)[0]
    with pytest.raises(ModelError, match="colour"):
        base.form(name).check(case.linear, {**spec, "colour": "red"})


# ---- weights and metrics ----


def specs(form: Form, linear: Linear) -> list[Spec]:
    """Specs for a linear of any shape; a new form needs some of its own here."""
    rank = max(1, min(linear.out_features, linear.in_features) // 2)

    def grids(*parts: str, bits: int, symmetric: bool) -> Spec:
        sizes = {"A": rank, "B": linear.in_features, "R": linear.in_features}
        groups = {part: 32 if sizes[part] % 32 == 0 else None for part in parts}
        return {part: {"bits": bits, "group": groups[part], "symmetric": symmetric} for part in parts}

    return {
        DENSE: [{}],
        "low-rank": [{"rank": rank, "pivoted": False}]
        + [{"rank": rank, "pivoted": True} for _ in range(rank < linear.out_features)],
        "integers": [grids("R", bits=bits, symmetric=bits > 3)["R"] for bits in (2, 4, 8)],
        "integer-factors": [{"rank": rank, "grids": grids("A", "B", bits=8, symmetric=s)} for s in (True, False)],
        "integers+factors": [
            {"rank": rank, "grids": grids(*parts, bits=4, symmetric=s)} for parts in ("R", "ABR") for s in (True, False)
        ],
        "narrow": [
            {side: -(-size // 2)} | grid
            for side, size in (("inputs", linear.in_features), ("outputs", linear.out_features))
            for grid in ({}, *({"grid": {"bits": bits, "group": None, "symmetric": bits > 3}} for bits in (2, 8)))
        ],
        "columns": [{"count": max(1, linear.in_features // 2)}],
    }[form.name]


@pytest.mark.parametrize("name", STORED)
@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(1, 1), (1, 32), (32, 1), (8, 32), (32, 8), (6, 6)]),
    st.sampled_from([-14, -8, 0, 8, 14]),
    st.sampled_from([-15, -8, 0, 8, 15]),
    st.sampled_from(["full", "thin", "zero", "none"]),
    st.sampled_from(["full", "zero", "rank 1"]),
)
@example((32, 8), -8, 0, "thin", "rank 1")  # integers leave nothing that the metric sees
def test_no_weight_and_no_metric_is_too_odd(name, shape, power, metric_power, samples, kind):
    """Vectors, zeros, low ranks, any scale: what is stored is finite, and no worse than nothing."""
    W = {
        "full": normal(*shape),
        "zero": torch.zeros(shape),
        "rank 1": normal(shape[0], 1) @ normal(1, shape[1], seed=2),
    }
    W = W[kind].double() * 10.0**power
    X = normal(2 if samples == "thin" else 40, shape[1], seed=1) * 10.0**metric_power * (samples != "zero")
    C = None if samples == "none" else X.T @ X
    linear = Linear("a", "backbone", None, "up", *shape, None, torch.float32)
    case = Problem(linear, lambda: W, lambda: (C, None), StoragePart(), QuantizePart(bits="auto", group=32))
    form = base.form(name)
    for spec in specs(form, linear):
        layer: Any = form.build(dense(linear, bias=False), spec)
        layer.load_state_dict(form.make(case, spec))
        stored = layer.product().detach().double()
        assert stored.isfinite().all()
        assert error(W - stored, C) <= error(W, C) * (1 + 1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_a_weight_that_is_not_finite_is_named(name: str) -> None:
    case, spec = some(name)[0]
    case.W[3, 4] = torch.inf
    with pytest.raises(NumericalError, match=r"^a: its weight holds NaN or infinity; check the model's weights"):
        made(case, name, spec)
