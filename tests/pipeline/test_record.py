"""What spectrim.json says of a checkpoint is true of its files."""

import pytest
import torch

import families
from helpers.matrices import close, ranked
from helpers.samples import processor
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate
from spectrim.checkpoint import load, read_provenance
from spectrim.maths.decompose import decompose, factors
from spectrim.metrics.metric import layer_metric
from spectrim.pipeline import compress, compression
from spectrim.plan.plan import Plan, plan_row
from spectrim.recipe import Recipe
from spectrim.storage import filled, stored_layers


@pytest.fixture(scope="module")
def dense(words, tmp_path_factory):
    """Two checkpoints of the few-layer LLaVA, in 32 bits and in 16, and the statistics of each."""
    root, found = tmp_path_factory.mktemp("dense"), {}
    for dtype in (torch.float32, torch.bfloat16):
        path = root / str(dtype)
        families.FAMILIES["llava"]().to(dtype).save_pretrained(path)
        given = {"processor": processor("llava"), "text": words, "samples": 6, "seqlen": 16, "curvature": True}
        found[dtype] = path, calibrate(load(path), root / f"{dtype} statistics", **given)
    return found


@torch.no_grad()
def changes_of(checkpoint, dense_directory) -> dict[str, torch.Tensor]:
    """By linear: how the weight [out, in] of the function that the loaded layer computes differs from the dense one.

    Outputs that a narrower MLP leaves out are read by nothing, and change nothing.
    """
    small, before = load(checkpoint), load(dense_directory)
    found = {}
    for name, layer in stored_layers(small).items():
        y = layer.double()(torch.eye(layer.in_features, dtype=torch.float64))
        W = y.T if layer.bias is None else (y - layer.bias).T
        found[name] = W - before.get_submodule(name).weight.double()
        if layer.spec.get("outputs"):
            left_out = set(range(layer.out_features)) - set(layer.units.tolist())
            found[name][sorted(left_out)] = 0
    return found


@pytest.mark.parametrize(
    ("recipe", "retain", "changes", "dtype"),
    [
        ("curvature", 0.6, {}, torch.float32),
        ("laser", 0.6, {}, torch.bfloat16),
        ("spectrim", 0.6, {"compensate.kind": "none"}, torch.float32),
        ("spectrim", 0.6, {"compensate.kind": "none"}, torch.bfloat16),
        ("curvature+gptq", 0.3, {}, torch.bfloat16),
        ("curvature+gptq", 0.2, {"quantize.bits": 3}, torch.float32),
    ],
)
def test_the_predicted_loss_is_that_of_the_written_weights(recipe, retain, changes, dtype, dense, tmp_path):
    """½ tr(G D C Dᵀ) per label, from the sums of the calibration and the linears of the checkpoint."""
    directory, statistics = dense[dtype]
    given = {"recipe": recipe, "retain": retain, "stats": statistics, "processor": processor("llava")}
    compress(load(directory), tmp_path / "small", changes=changes, **given)
    found = changes_of(tmp_path / "small", directory)
    plan = Plan.read(tmp_path / "small" / "plan.json")
    assert found.keys() == set(plan.changed)
    expected = {"text": 0.0, "image": 0.0}
    for name, D in found.items():
        for modality in expected:
            moment, output = statistics.moment(name, modality), statistics.output(name, modality)
            if moment is not None and output is not None:
                assert output.form.kind == "full"
                GD, DC = output.sums["output"] @ D, D @ moment.second / moment.count
                expected[modality] += 0.5 * float((GD * DC).sum()) / output.labels
    assert min(expected.values()) > 0
    assert read_provenance(tmp_path / "small")["predicted_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("recipe", "apart"), [("laser", False), ("curvature", True)])
def test_a_plan_may_factor_heads_otherwise_than_its_recipe(recipe, apart, dense):
    """Whole where the recipe factors head by head, and the other way round: the best in that metric either way."""
    directory, statistics = dense[torch.float32]
    model = load(directory)
    linear = next(x for x in anatomy(model).in_place("backbone") if x.role == "q")
    assert linear.heads > 1
    rank = [2, 3, *[1] * (linear.heads - 2)] if apart else 5
    row, module = plan_row(linear, "low-rank", {"rank": rank}), model.get_submodule(linear.name)
    with compression(model, recipe, stats=statistics) as prepared:
        tensors = prepared.maker.make(linear, row)
    found = filled(module, row.form, row.spec, tensors).double().product().detach()
    metric = layer_metric(Recipe.read("laser" if apart else "curvature").metric, linear, statistics)
    W = module.weight.detach().double()
    if apart:
        spectrum = decompose(W, metric.value, metric.output, linear.heads)
        A, B = factors(W, *spectrum.directions(tuple(rank)))
        expected = A @ B
    else:
        expected = ranked(decompose(W, metric.value, metric.output), W, rank)
    close(found, expected, 1e-4)


def test_the_record_of_a_compensated_checkpoint_has_the_prediction_of_its_plan(dense, tmp_path):
    directory, statistics = dense[torch.float32]
    compress(load(directory), tmp_path / "small", retain=0.6, stats=statistics, processor=processor("llava"))
    plan = Plan.read(tmp_path / "small" / "plan.json")
    assert plan.loss > 0
    assert read_provenance(tmp_path / "small")["predicted_loss"] == {"joint": plan.loss}


def test_the_prediction_of_a_language_model_is_of_text(words, tmp_path):
    model = families.FAMILIES["llama"]()
    given = {"text": words, "samples": 6, "seqlen": 16}
    compress(model, tmp_path / "small", retain=0.6, processor=processor("llama"), **given)
    assert list(read_provenance(tmp_path / "small")["predicted_loss"]) == ["text"]


@pytest.mark.parametrize(("recipe", "retain"), [("spectrim", 0.6), ("curvature+gptq", 0.3), ("laser", 0.7)])
def test_counts_by_place_are_those_of_the_layers(recipe, retain, dense, tmp_path):
    directory, statistics = dense[torch.float32]
    given = {"recipe": recipe, "retain": retain, "stats": statistics, "processor": processor("llava")}
    compress(load(directory), tmp_path / "small", **given)
    record, small = read_provenance(tmp_path / "small"), load(tmp_path / "small")
    layers, parts = stored_layers(small), anatomy(load(directory))
    kept = 0
    for place, said in record["places"].items():
        linears = parts.in_place(place)
        counts: dict[str, int] = {}
        size, ranks = 0, []
        for linear in linears:
            layer = layers.get(linear.name)
            form = "dense" if layer is None else layer.form
            counts[form] = counts.get(form, 0) + 1
            held = small.get_submodule(linear.name).state_dict()
            stored = [tensor for key, tensor in held.items() if key != "bias"]
            size += sum(tensor.nbytes for tensor in stored)
            kept += sum(tensor.numel() for tensor in stored if tensor.is_floating_point())
            if "rank" in (spec := {} if layer is None else layer.spec):
                ranks.append(spec["rank"] if isinstance(spec["rank"], int) else sum(spec["rank"]))
        ranks.sort()
        assert said["linears"] == len(linears)
        assert said["forms"] == counts
        assert said["ranks"] == ([ranks[0], ranks[len(ranks) // 2], ranks[-1]] if ranks else [])
        assert said["bytes"] == size
        assert said["dense_bytes"] == sum(linear.nbytes for linear in linears)
    total = sum(linear.params for linear in parts.linears)
    if recipe != "curvature+gptq":  # with integers, numbers are those of the shapes
        assert record["retention"]["params"] == pytest.approx(kept / total)
    assert record["bytes"]["linears"] == sum(said["bytes"] for said in record["places"].values())
