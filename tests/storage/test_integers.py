"""A dense weight in integers: which grids are options, what they are predicted to cost, and what is made."""

from dataclasses import replace

import pytest
import torch

from helpers.problems import lost, problem
from spectrim.errors import ModelError
from spectrim.linear import Linear
from spectrim.maths.rounding import Grid, conditional, expected, quantize
from spectrim.recipe import QuantizePart
from spectrim.storage import Problem, form, forms, made
from spectrim.storage.integers import checked_grid
from spectrim.storage.packed import PackedLinear

INTEGERS = form("integers")


def layer_of(given: Problem, spec) -> PackedLinear:
    out, size = given.W.shape
    layer = INTEGERS.build(torch.nn.Linear(size, out, bias=False, dtype=given.linear.dtype), spec)
    layer.load_state_dict(made(given, "integers", spec))
    return layer


@pytest.mark.parametrize("roles", ["all", "feed-forward"])
def test_plain_checkpoints_have_no_factors(roles: str) -> None:
    """The role is `up`, or that of q; bytes that are known before are those of the option."""
    part = QuantizePart(bits=4, group=32, roles=roles, format="compressed-tensors")
    for given in (problem(64, 96, quantize=part), problem(64, 96, quantize=part, heads=4)):
        found = {one.name: one.options(given) for one in forms()}
        sizes = {name: menu.bytes.tolist() for name, menu in found.items() if len(menu.bytes)}
        kind = "integers" if roles == "all" or given.linear.role == "up" else "dense"
        assert sizes == {kind: [min(one.least(given.linear, part) for one in forms())]}


@pytest.mark.parametrize("bits", [2, 4])
def test_only_our_own_format_has_negative_scales(bits: int) -> None:
    for format, signed in (("spectrim", True), ("compressed-tensors", False)):
        given = problem(64, 96, quantize=QuantizePart(bits=bits, group=32, format=format))
        menu = INTEGERS.options(given)
        assert bool((layer_of(given, menu.spec(0)).weight_scale < 0).any()) == signed
        weights = conditional(given.C, 96, given.W, 0.1), conditional(given.G, 64, given.W, 0.1)
        priced = expected(given.W.double(), Grid(bits, 32), *weights, torch.float32, signed=signed)
        assert menu.error.tolist() == [pytest.approx(float(priced.sum()))]


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, None), (4, 32), (8, None)])
def test_the_weight_is_rounded_in_both_metrics(bits: int, group: int | None, symmetric: bool, heads: int) -> None:
    """The metric of the outputs is that of all heads, which have one each."""
    given = problem(heads=heads, quantize=QuantizePart(bits=4, damping=0.02))
    grid = Grid(bits, group, symmetric)
    layer = layer_of(given, grid.spec)
    nats = torch.linspace(0.5, 2.0, heads, dtype=torch.float64).tolist()
    each = 24 // heads
    eye = torch.eye(each, dtype=torch.float64)
    G = torch.block_diag(*(n * root.metric_times(eye) for n, root in zip(nats, given.output.roots, strict=True)))
    wanted = quantize(given.W, grid, given.C, G, dtype=torch.float32, damping=(0.02, 0.02))
    assert torch.equal(layer.product(), wanted.dense().float())
    assert layer.weight_scale.dtype == torch.float32


@pytest.mark.parametrize("metrics", ["none", "diagonal", "inputs", "both"])
def test_rounding_to_nearest_looks_at_no_metric(metrics: str) -> None:
    given = problem(metrics=metrics, quantize=QuantizePart(bits=4, method="rtn"))
    grid = Grid(4, 32)
    wanted = quantize(given.W, grid, dtype=torch.float32)
    assert torch.equal(layer_of(given, grid.spec).product(), wanted.dense().float())


@pytest.mark.parametrize(
    ("bits", "group", "size", "wanted"),
    [
        ("auto", 32, 64, [(2, 32), (3, 32), (4, 32), (8, 32)]),
        ("auto", 128, 64, [(2, None), (3, None), (4, None), (8, None)]),  # 128 do not divide 64
        (3, 64, 64, [(3, 64)]),
        (4, None, 64, [(4, None)]),
        (None, 32, 64, []),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_options_are_the_grids_of_the_recipe(bits, group, size, wanted, symmetric) -> None:
    given = problem(24, size, quantize=QuantizePart(bits=bits, group=group, symmetric=symmetric))
    options = INTEGERS.options(given)
    found = [options.spec(number) for number in range(len(options.bytes))]
    assert found == [{"bits": b, "group": g, "symmetric": symmetric} for b, g in wanted]


def test_the_predicted_error_weighs_residuals_of_rounding_to_nearest() -> None:
    """By the squared diagonals of both triangular roots; by those of the metrics where nothing is fed on."""
    for method in ("gptq", "rtn"):
        given = problem(24, 64, quantize=QuantizePart(bits="auto", group=32, method=method, damping=0.05))
        options = INTEGERS.options(given)
        C, G = given.C, given.G
        inputs, outputs = C.diagonal(), G.diagonal()
        if method == "gptq":
            inputs, outputs = (conditional(M, len(M), given.W.double(), 0.05) for M in (C, G))
            assert (inputs <= C.diagonal() + 0.05 * C.diagonal().mean() + 1e-12).all()
        for number, bits in enumerate((2, 3, 4, 8)):
            each = expected(given.W.double(), Grid(bits, 32), inputs, outputs, torch.float32, fed=method == "gptq")
            assert options.error[number] == pytest.approx(float(each.sum()))


@pytest.mark.parametrize("seed", range(3))
def test_rounding_to_nearest_costs_what_is_predicted(seed: int) -> None:
    """Without feedback, in metrics without steep directions: residuals are as good as independent."""
    given = problem(96, 128, seed=seed, floor=1.0, quantize=QuantizePart(bits="auto", group=32, method="rtn"))
    options = INTEGERS.options(given)
    for number, predicted in enumerate(options.error):
        true = lost(given, layer_of(given, options.spec(number)).product())
        assert predicted / 1.5 < true < predicted * 1.5


def test_feedback_pays() -> None:
    found = {}
    for method in ("gptq", "rtn"):
        given = problem(quantize=QuantizePart(bits=4, group=32, method=method))
        found[method] = lost(given, layer_of(given, INTEGERS.options(given).spec(0)).product())
    assert found["gptq"] < 0.5 * found["rtn"]


def test_no_integers_for_an_empty_recipe_and_no_bytes_below_the_least() -> None:
    linear = Linear("a", "backbone", None, "up", 24, 32, None, torch.float32)
    assert INTEGERS.least(linear, QuantizePart()) == linear.nbytes
    assert INTEGERS.least(linear, QuantizePart(bits=4)) == 0  # not known before the grid fits


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"bits": 9},
        {"bits": 1},
        {"bits": True},
        {"bits": "4"},
        {"bits": 4.0},
        {"bits": 4, "group": 0},
        {"bits": 4, "group": -32},
        {"bits": 4, "group": False},
        {"bits": 4, "group": ""},
        {"bits": 4, "symmetric": 1},
        {"bits": 4, "zero": 1},
        [4, 32],
        None,
    ],
)
def test_what_is_no_grid_is_refused(wrong) -> None:
    with pytest.raises(ModelError, match=r"no grid of integers; give bits \(2 to 8\), group \(a size, or null"):
        checked_grid(wrong)


def test_a_grid_says_what_it_leaves_out() -> None:
    assert checked_grid({"bits": 4}) == Grid(4, None, True)
    assert checked_grid({"bits": 3, "group": 64, "symmetric": False}) == Grid(3, 64, False)
    linear = Linear("a", "backbone", None, "up", 24, 32, None, torch.float32)
    with pytest.raises(ModelError, match="groups of 24 do not divide 32 inputs; choose another group"):
        INTEGERS.check(linear, {"bits": 4, "group": 24})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    given = problem(dtype=dtype, quantize=QuantizePart(bits=4))
    tensors = made(given, "integers", {"bits": 4, "group": 32, "symmetric": False})
    assert tensors["weight_scale"].dtype == dtype
    assert tensors["weight_zero_point"].dtype == torch.int32
    assert tensors["weight_shape"].tolist() == [24, 32]


def test_few_positions_dampen_inputs_and_outputs_by_their_numbers() -> None:
    given = replace(problem(24, 64, quantize=QuantizePart(bits=3)), positions=(256.0, 128.0))
    layer = layer_of(given, Grid(3, None).spec)
    rounded = {
        damping: quantize(given.W, Grid(3, None), given.C, given.G, dtype=torch.float32, damping=damping).dense()
        for damping in ((0.06, 0.0475), (0.06, 0.06), (0.1, 0.1))
    }
    same = [torch.equal(layer.product(), dense.float()) for dense in rounded.values()]
    assert same == [True, False, False]
    weights = conditional(given.C, 64, given.W, 0.06), conditional(given.G, 24, given.W, 0.0475)
    priced = expected(given.W.double(), Grid(3, None), *weights, torch.float32)
    assert INTEGERS.options(given).error.tolist() == [pytest.approx(float(priced.sum()))]
