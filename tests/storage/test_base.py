"""What all layers in a stored form share: their exchange for linears, their weights, and the register of forms."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from compressed import config_of, logits, pack_nearest, randomised
from families import FAMILIES
from helpers.columns import ColumnLinear, Columns
from helpers.exchanged import replace_linears
from spectrim import compress, load
from spectrim.anatomy import anatomy
from spectrim.checkpoint import read_provenance, save
from spectrim.errors import CheckpointError, ModelError
from spectrim.lazy import LazyWeight
from spectrim.maths.rounding import Grid
from spectrim.plan.plan import Plan, plan_row
from spectrim.storage import base, exchange, form, forms, register, stored_layers
from spectrim.storage.layers import LowRankLinear
from spectrim.storage.lora import lora_targets
from spectrim.storage.packed import PackedLinear

# ---- weights ----

SAMPLES = ("whole", "headwise", "pivoted", "packed", "packed factors", "rest")


def layer_of(form: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, dtype=dtype))
    if form != "packed":
        replace_linears(model, {"0": (3, 5, 4) if form == "headwise" else 7}, {"0"} if form == "pivoted" else ())
        randomised(model[0])
    parts = {"packed": ["0"], "packed factors": ["0.A", "0.B"], "rest": ["0.R"]}.get(form, [])
    pack_nearest(model, {name: Grid(4, None, symmetric=False) for name in parts})
    return model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", SAMPLES)
def test_what_a_weight_is_like_is_known_without_its_values(form: str, dtype: torch.dtype, monkeypatch) -> None:
    layer = layer_of(form, dtype)
    for kind, method in ((LowRankLinear, "product"), (PackedLinear, "unpacked")):
        monkeypatch.setattr(kind, method, lambda self: pytest.fail("the values were computed"))
    weight = layer.weight
    assert (weight.dtype, weight.device, weight.layout) == (dtype, torch.device("cpu"), torch.strided)
    assert weight.shape == weight.size() == (48, 64)
    assert (weight.size(0), len(weight), weight.ndim, weight.dim(), weight.numel()) == (48, 48, 2, 2, 48 * 64)
    assert weight.is_floating_point()
    assert torch.is_floating_point(weight)
    assert not weight.is_cuda
    assert not weight.is_meta
    assert weight.element_size() == weight.itemsize == dtype.itemsize
    assert weight.requires_grad == (form not in ("packed", "packed factors"))  # as any part of it does
    assert weight.get_device() == -1


@pytest.mark.parametrize("form", SAMPLES)
def test_the_matrix_is_right_wherever_it_is_used(form: str) -> None:
    layer, x = layer_of(form), torch.randn(3, 64)
    expected = layer(x) - (0 if layer.bias is None else layer.bias)
    close = {"rtol": 1e-4, "atol": 1e-4}
    weight = layer.weight
    torch.testing.assert_close(functional.linear(x, weight), expected, **close)
    torch.testing.assert_close(x @ weight.T, expected, **close)
    torch.testing.assert_close((weight @ x.T).T, expected, **close)
    torch.testing.assert_close(functional.linear(x, weight=weight), expected, **close)
    torch.testing.assert_close(functional.linear(x.double(), weight.to(torch.float64)).float(), expected, **close)
    torch.testing.assert_close(torch.einsum("oi,ni->no", weight, x), expected, **close)
    torch.testing.assert_close(torch.stack([weight, weight])[1], layer.to_dense().weight)  # among other tensors
    assert torch.equal(torch.cat([weight.data, weight.detach()])[48:], layer.to_dense().weight)
    assert not isinstance(weight.clone(), LazyWeight)


def test_gradients_pass_through_the_matrix() -> None:
    layer, x = layer_of("whole"), torch.randn(3, 64)
    functional.linear(x, layer.weight).square().sum().backward()
    through = [parameter.grad.clone() for parameter in (layer.A.weight, layer.B.weight)]
    layer.zero_grad()
    layer.A(layer.B(x)).square().sum().backward()
    for a, b in zip(through, (layer.A.weight, layer.B.weight), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.copy_(torch.ones(48, 64)),
        lambda weight: weight.data.zero_(),
        lambda weight: nn.init.normal_(weight),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: setattr(weight, "data", torch.ones(48, 64)),
    ],
)
def test_writing_to_it_is_an_error(write: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(ModelError, match="dequantize the model to write it"):
        write(layer_of("whole").weight)


@pytest.mark.parametrize("form", SAMPLES)
def test_compiled_code_reads_it_without_a_graph_break(form: str) -> None:
    layer, x = layer_of(form), torch.randn(3, 64)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return layer(x.to(layer.weight.dtype)) + functional.linear(x, layer.weight)

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), forward(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", SAMPLES)
def test_inputs_are_given_by_position_or_by_name(form: str) -> None:
    layer, x = layer_of(form), torch.randn(3, 64)
    assert torch.equal(layer(input=x), layer(x))


# ---- exchange ----


def two_layers() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 5, dtype=torch.bfloat16), nn.ModuleDict({"x": nn.Linear(5, 4, bias=False)})
    ).eval()


def low_rank(rank: Any) -> tuple[str, dict[str, Any]]:
    return "low-rank", {"rank": rank}


def test_exchange_keeps_shape_dtype_bias_and_mode() -> None:
    model = two_layers()
    bias = model[0].bias
    model[1]["x"].weight.requires_grad_(False)
    exchange(model, {"0": low_rank(3), "1.x": low_rank(2)})
    first, second = model[0], model[1]["x"]
    assert first.bias is bias
    assert (first.in_features, first.out_features, first.rank) == (6, 5, 3)
    assert first.A.weight.dtype == first.B.weight.dtype == torch.bfloat16
    assert second.bias is None
    assert second.A.weight.dtype == torch.float32
    assert first.A.weight.requires_grad
    assert not second.A.weight.requires_grad
    assert not first.training


def test_exchange_by_head() -> None:
    model = two_layers()
    bias = model[0].bias
    exchange(model, {"0": low_rank([1, 1, 1, 1, 1])})
    assert isinstance(model[0], LowRankLinear)
    assert model[0].rank == (1, 1, 1, 1, 1)
    assert model[0].bias is bias
    assert {parameter.dtype for parameter in model[0].parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("layer", [low_rank(2), low_rank((1, 1, 1, 1, 1)), ("integers", {"bits": 4})])
def test_exchange_on_the_meta_device_allocates_nothing(layer: Any) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5))
    exchange(model, {"0": layer})
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"nowhere.q": low_rank(2)}, "no module 'nowhere.q'; forms are keyed by the names of its linears"),
        ({"1": low_rank(2)}, "'1' is a ModuleDict, not an nn.Linear; keep it dense"),
        ({"1.x": low_rank(0)}, r"'1\.x': .*at least 1"),
        ({"1.x": low_rank((1, 1, 1))}, r"'1\.x': 4 outputs are not 3 equal heads"),
        ({"1.x": ("integers", {"bits": 4, "group": 32})}, r"'1\.x': groups of 32 do not divide 5 inputs"),
        ({"1.x": ("sparse", {})}, r"'1\.x': there is no form of storage 'sparse', only dense, .*; import the package"),
    ],
)
def test_what_cannot_be_exchanged_changes_nothing(layers: dict[str, Any], message: str) -> None:
    model = two_layers()
    before = dict(model.named_modules())
    with pytest.raises(ModelError, match=message):
        exchange(model, {"0": low_rank(2), **layers})
    assert dict(model.named_modules()) == before


def test_a_subclass_of_linear_is_not_exchanged() -> None:
    model = nn.MultiheadAttention(8, 2)  # reads out_proj.weight without calling out_proj
    with pytest.raises(ModelError, match="NonDynamicallyQuantizableLinear"):
        exchange(model, {"out_proj": low_rank(2)})


def test_layers_inside_layers_are_not_listed() -> None:
    """A layer of integer factors holds layers of integers."""
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "ab": nn.Linear(64, 8), "c": nn.ModuleDict({"a": nn.Linear(64, 8)})})
    grids = {"A": {"bits": 4}, "B": {"bits": 4}}
    exchange(model, {"a": ("integer-factors", {"rank": 4, "grids": grids}), "ab": ("integers", {"bits": 4})})
    assert list(stored_layers(model)) == ["a", "ab"]
    assert list(stored_layers(model["a"])) == [""]
    assert [layer.form for layer in stored_layers(model).values()] == ["integer-factors", "integers"]


# ---- a form of somebody else ----


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> Columns:
    monkeypatch.setattr(base, "_FORMS", dict(base._FORMS))
    found = register(Columns())
    assert form("columns") is forms()[-1] is found
    return found


@pytest.fixture
def plan(columns: Columns, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """A file in which some linears are in that form, and the spec of each by name."""
    linears = anatomy(FAMILIES["llama"]()).linears
    rows = {x.name: plan_row(x) for x in linears}
    specs = {x.name: {"count": x.in_features // 2 + n} for n, x in enumerate(linears[::3])}
    rows |= {x.name: plan_row(x, "columns", specs[x.name]) for x in linears[::3]}
    (tmp_path / "plan.json").write_text(Plan(recipe="svd", linears=rows).json())
    return str(tmp_path / "plan.json"), specs


def test_it_is_planned_made_saved_loaded_and_merged(plan: Any, tmp_path: Path) -> None:
    path, specs = plan
    model = FAMILIES["llama"]()
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in specs}
    small = compress(model, tmp_path / "a", recipe="svd", plan=path)
    expected = logits(small)
    assert config_of(tmp_path / "a")["quantization_config"]["forms"] == {
        name: {"form": "columns", **spec} for name, spec in specs.items()
    }
    again = load(tmp_path / "a")
    assert torch.equal(logits(again), expected)
    assert stored_layers(again).keys() == specs.keys()
    for name, layer in stored_layers(again).items():
        assert isinstance(layer, ColumnLinear)
        assert layer.spec == specs[name]
        W = layer.to_dense().weight
        assert torch.equal(W, dense[name] * (W != 0).any(0))
        assert int((W != 0).any(0).sum()) == specs[name]["count"]
    save(again, tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    places = read_provenance(tmp_path / "a")["places"]["backbone"]
    assert places["forms"]["columns"] == len(specs)
    torch.testing.assert_close(logits(again.dequantize()), expected, rtol=1e-4, atol=1e-4)


def test_it_competes_with_the_others_for_bytes(columns: Columns, tmp_path: Path) -> None:
    """A weight of few columns is best stored by them, as it is by nothing else."""
    model = FAMILIES["llama"]()
    name = "model.layers.0.mlp.up_proj"
    W = model.get_submodule(name).weight
    with torch.no_grad():
        W[:, torch.arange(W.shape[1]) % 3 > 0] = 0
    compress(model, tmp_path / "a", recipe="svd", retain=0.5)
    rows = json.loads((tmp_path / "a" / "plan.json").read_text())["linears"]
    assert rows[name]["form"] == "columns"
    assert {row["form"] for other, row in rows.items() if other != name} == {"low-rank"}


def test_it_takes_part_in_what_lora_adapts(plan: Any, tmp_path: Path) -> None:
    """It has no linears inside; those beside it that stayed dense are the targets."""
    path, specs = plan
    small = compress(FAMILIES["llama"](), tmp_path / "a", recipe="svd", plan=path)
    targets = lora_targets(small)
    assert targets
    assert not set(targets) & specs.keys()
    assert all(type(small.get_submodule(name)) is nn.Linear for name in targets)


def test_without_its_package_a_checkpoint_and_a_plan_are_refused(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = plan
    compress(FAMILIES["llama"](), tmp_path / "a", recipe="svd", plan=path)
    monkeypatch.delitem(base._FORMS, "columns")
    with pytest.raises(CheckpointError, match=r"no form of storage 'columns'.*import the package that registers it"):
        load(tmp_path / "a")


def test_what_does_not_fit_the_model_is_refused_when_it_is_loaded(plan: Any, tmp_path: Path) -> None:
    path, specs = plan
    compress(FAMILIES["llama"](), tmp_path / "a", recipe="svd", plan=path)
    config = config_of(tmp_path / "a")
    name = next(iter(specs))
    config["quantization_config"]["forms"][name]["count"] = 10**9
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"'{name}': .*no count of columns"):
        load(tmp_path / "a")
