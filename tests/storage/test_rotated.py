"""Integers on rotated inputs: where they are options, and that every layer that has them computes the same."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from helpers.matrices import normal
from helpers.problems import problem
from spectrim.checkpoint.plain import one_grid
from spectrim.errors import CheckpointError, ModelError
from spectrim.linear import Linear
from spectrim.maths import rotation
from spectrim.maths.rounding import Grid, error, quantize
from spectrim.recipe import QuantizePart, StoragePart
from spectrim.storage import Problem, form
from spectrim.storage import problem as problems
from spectrim.storage.packed import PackedLinear

ROTATE = QuantizePart(bits="auto", group=32, rotate=True)
NO = Grid(3, 32).spec


def uneven(size: int = 64, name: str = "a", **how) -> Problem:
    """One whose weight has a few large columns."""
    given = problem(24, size, **{"quantize": ROTATE, **how})
    W = given.W.clone()
    W[:, ::16] *= 10
    linear = Linear(name, "backbone", "layers.0" if "expert" in name else None, "up", 24, size, None, W.dtype)
    return Problem(linear, lambda: W, given.metrics, given.storage, given.quantize)


@pytest.mark.parametrize(
    ("given", "rotates"),
    [
        (uneven(), True),
        (uneven(metrics="inputs"), True),
        (uneven(metrics="none"), True),
        (uneven(metrics="diagonal"), False),  # there it would be no diagonal any more
        (uneven(40), False),  # no multiple of 16
        (uneven(quantize=QuantizePart(bits="auto")), False),
        (uneven(quantize=QuantizePart(bits=4, format="compressed-tensors", rotate=True)), False),
        (uneven(quantize=QuantizePart(bits=4, method="rtn", rotate=True)), True),
        (uneven(name="layers.0.experts.3.up"), True),
        (uneven(name="layers.0.experts.3.up", storage=StoragePart(experts="same")), False),
    ],
)
def test_inputs_are_rotated_where_the_recipe_and_the_shape_allow_it(given, rotates):
    options = form("integers").options(given)
    assert {options.spec(n).get("rotated", False) for n in range(len(options.bytes))} == {rotates}
    assert all("rotated" not in options.spec(n) for n in range(len(options.bytes))) != rotates


@pytest.mark.parametrize("quantize", [ROTATE, QuantizePart(bits=2, rotate=True), QuantizePart(bits=4, rotate=True)])
def test_they_are_where_the_predicted_error_falls_enough(quantize, monkeypatch):
    given, bits = uneven(quantize=quantize), 3 if quantize.bits == "auto" else quantize.bits
    plain, rotated = (float(given.noise(given.W, given.grid(bits, 64, rotated=x)).sum()) for x in (False, True))
    for share, rotates in ((1.01, True), (0.99, False)):
        monkeypatch.setattr(problems, "_WORTH", share * rotated / plain)
        assert uneven(quantize=quantize).rotates == rotates


def test_what_is_rotated_loses_less_at_equal_bytes():
    """Predicted and made, in every number of bits."""
    whole = []
    for rotate in (False, True):
        given = uneven(quantize=QuantizePart(bits="auto", group=32, rotate=rotate))
        options = form("integers").options(given)
        made = []
        for number in range(len(options.bytes)):
            layer = form("integers").build(nn.Linear(64, 24, bias=False), options.spec(number))
            layer.load_state_dict(form("integers").make(given, options.spec(number)))
            made.append(error(given.W - layer.product(), given.C, given.G))
        whole.append((options.bytes.tolist(), options.error.tolist(), made))
    (one, predicted, found), (other, predicted_now, found_now) = whole
    assert one == other
    assert all(now < 0.9 * before for before, now in zip(predicted, predicted_now, strict=True))
    assert all(now < 0.9 * before for before, now in zip(found, found_now, strict=True))


def test_only_what_reads_the_inputs_is_rotated():
    given = uneven()
    for kind, parts in (
        ("integer-factors", {"A": False, "B": True}),
        ("integers+factors", {"A": False, "B": True, "R": True}),
    ):
        options = form(kind).options(given)
        for number in range(len(options.bytes)):
            grids = options.spec(number)["grids"]
            assert {part: grid.get("rotated", False) for part, grid in grids.items()} == parts
    narrow = problem(24, 64, quantize=ROTATE, storage=StoragePart(narrow=True))
    object.__setattr__(narrow, "weight", lambda: uneven().W)
    options = form("narrow").options(narrow)
    specs = [spec for number in range(len(options.bytes)) if "grid" in (spec := options.spec(number))]
    assert specs
    assert all(spec["grid"].get("rotated", False) == (spec["inputs"] % 16 == 0) for spec in specs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("runtime", ["reference", "auto", "memory"])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 32, True), (3, None, True), (4, 32, False), (8, 64, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_with_the_weight_that_it_says_it_has(dtype, bits, group, symmetric, runtime, bias):
    grid = Grid(bits, group, symmetric, rotated=True)
    layer = PackedLinear(64, 48, grid, bias=bias, dtype=dtype)
    found = quantize(normal(48, 64), grid, dtype=dtype)
    layer.load(found)
    if bias:
        layer.bias.data.copy_(normal(48, 1)[:, 0])
    layer.run_as(runtime)
    W = layer.product()
    torch.testing.assert_close(W.double(), found.dense(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(layer.to_dense().weight, W)
    for rows in (1, 3, 200):
        x = normal(rows, 64, seed=rows).to(dtype)
        expected = nn.functional.linear(x.double(), W.double(), None if layer.bias is None else layer.bias.double())
        loose = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
        torch.testing.assert_close(layer(x).double(), expected, **loose)
    assert layer.spec["rotated"] is True
    assert "rotated=True" in repr(layer)


def test_inputs_that_are_no_blocks_are_refused():
    with pytest.raises(ModelError, match="40 inputs cannot be rotated 16 at a time"):
        PackedLinear(40, 8, Grid(4, None, rotated=True))


def test_specs_say_it_only_where_it_is_so():
    assert NO == {"bits": 3, "group": 32, "symmetric": True}
    assert form("integers").grid(NO | {"rotated": True}) == Grid(3, 32, rotated=True)
    with pytest.raises(ModelError, match="symmetric and rotated"):
        form("integers").grid(NO | {"rotated": 1})
    with pytest.raises(ModelError, match="no inputs that could be rotated"):
        form("integer-embedding").grid(NO | {"rotated": True, "shared": False})

    with pytest.raises(ModelError, match="A reads what B gives, which is not rotated"):
        form("integer-factors").build(nn.Linear(64, 48), {"rank": 32, "grids": {"A": NO | {"rotated": True}, "B": NO}})


@pytest.mark.parametrize("others", [{}, {"b": ("integers", NO)}, {"b": ("integers", NO | {"rotated": True})}])
def test_compressed_tensors_is_told_of_no_rotation(others):
    rotated = ("integers", {"bits": 4, "group": 32, "symmetric": True, "rotated": True})
    with pytest.raises(CheckpointError, match=r"'a' has them; plan again with quantize\.rotate=false"):
        one_grid({"a": rotated} | others)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fake_pass_leaves_nothing_behind(dtype):
    """A tracer's tensors are not kept for later passes."""
    layer = PackedLinear(64, 24, Grid(4, 32, rotated=True), bias=False, dtype=dtype)
    layer.load(quantize(normal(24, 64), layer.grid, dtype=dtype))
    x = normal(3, 64).to(dtype)
    rotation._held.cache_clear()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        assert type(layer(x)) is FakeTensor
    found = layer(x)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, x @ layer.dense().T, rtol=0.05, atol=0.5)


def test_rows_of_the_whole_weight_are_tried(monkeypatch):
    """Rows that want a rotation lie in one half of the weight, and are most of its error, wherever they lie."""
    given = problem(24, 64, quantize=ROTATE)
    spread, large = normal(12, 64, seed=3), normal(12, 64, seed=4)
    large[:, ::16] *= 100
    monkeypatch.setattr(problems, "_TRIED", 4)
    for parts in ((spread, large), (large, spread)):
        W = torch.cat(parts)
        assert Problem(given.linear, lambda W=W: W, given.metrics, given.storage, given.quantize).rotates


def test_the_decision_is_made_once(monkeypatch):
    """Of a metric that is rotated one form is made."""
    given, formed = uneven(), []
    real = problems.on_grid
    monkeypatch.setattr(problems, "on_grid", lambda C, grid: formed.append(grid.rotated) or real(C, grid))
    monkeypatch.setattr(problems, "_TRIED", 5)
    assert given.rotates
    form("integers").options(given)
    assert sorted(formed) == [False, True]
