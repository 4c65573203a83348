"""Compression end to end on few-layer models: budgets, plans, restoring, resuming, saving, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file

import families
from compressed import logits, low_rank
from helpers.samples import llava_processor, processor, word_tokenizer
from helpers.streams import assert_same, weights
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.checkpoint import load, read_provenance
from spectrim.errors import BudgetError, ModelError, NumericalError, RecipeError, SpectrimError, StatisticsError
from spectrim.metrics import spectra
from spectrim.pipeline import compress, compression
from spectrim.plan.plan import Plan
from spectrim.storage import stored_layers

FAMILIES = ("llava", "llama")


def model(family: str, dtype: torch.dtype = torch.float32):
    return families.FAMILIES[family]().to(dtype)


@pytest.fixture(scope="module")
def calibrated(words, tmp_path_factory) -> dict[str, Statistics]:
    return {
        family: calibrate(
            model(family),
            tmp_path_factory.mktemp(family) / "stats",
            processor=processor(family),
            text=words,
            samples=8,
            seqlen=16,
            gradients=True,
        )
        for family in FAMILIES
    }


def linear_bytes(one, names) -> int:
    """Bytes of the weights of linears, dense or factored, biases not counted."""
    total = 0
    for name in names:
        held = [p for key, p in one.get_submodule(name).named_parameters() if key != "bias"]
        total += sum(p.numel() * p.element_size() for p in held)
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["svd", "fwsvd", "asvd", "svd-llm", "jw-svd"])
def test_a_loaded_model_is_factored_in_place_within_the_budget(family, recipe, calibrated):
    dense = model(family)
    names = [linear.name for linear in anatomy(dense).linears]
    full = linear_bytes(dense, names)
    small = compress(dense, recipe=recipe, retain=0.5, stats=calibrated[family])
    assert small is dense
    assert low_rank(small)
    largest = max(4 * (linear.out_features + linear.in_features) for linear in anatomy(model(family)).linears)
    assert 0.5 * full - largest <= linear_bytes(small, names) <= 0.5 * full
    assert logits(small).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_of_the_plan_is_the_error_on_the_samples(family, calibrated):
    """Σ_{i>k} s_i / Σ s_i is what the second moment says about the difference of the weights."""
    dense = model(family, torch.float32)
    original = weights(dense)
    with compression(dense, "svd-llm", stats=calibrated[family]) as prepared:
        plan = prepared.plan(0.5)
        prepared.apply(plan)
    checked = 0
    dense.requires_grad_(False)
    for name, layer in low_rank(dense).items():
        row = plan.linears[name]
        assert layer.rank == row.rank
        if row.metric != "text":
            assert (row.metric, family) == ("identity", "llava")
            C = torch.eye(layer.in_features, dtype=torch.float64)
        else:
            C = calibrated[family].moment(name, "text").second
        W = original[f"{name}.weight"].double()
        D = W - layer.A.weight.double() @ layer.B.weight.double()
        assert float((D @ C @ D.T).trace() / (W @ C @ W.T).trace()) == pytest.approx(row.error, rel=1e-4, abs=1e-9)
        checked += 1
    assert checked == len(plan.changed) > 5


def test_all_of_the_budget_is_the_dense_model(calibrated):
    dense = model("llama")
    before = weights(dense)
    compress(dense, recipe="jw-svd", retain=1.0, stats=calibrated["llama"])
    assert_same(dense, before)


def test_one_decomposition_serves_all_budgets(words, tmp_path):
    options = {"processor": word_tokenizer(), "text": words, "samples": 4, "seqlen": 16}
    statistics = calibrate(model("llama"), tmp_path / "stats", **options)
    sizes, stamps = [], set()
    for retain in (0.8, 0.6, 0.4):
        small = compress(model("llama"), recipe="jw-svd", retain=retain, stats=statistics.path)
        files = sorted((statistics.path / "spectra").rglob("*.safetensors"))
        stamps.add(tuple((path, path.stat().st_mtime_ns, path.stat().st_ino) for path in files))
        sizes.append(sum(layer.rank for layer in low_rank(small).values()))
    assert len(files) == len(anatomy(model("llama")).linears)
    assert len(stamps) == 1
    assert sizes[0] != sizes[1] != sizes[2]
    Statistics.open(statistics.path)
    compress(model("llama"), recipe="svd", retain=0.5, stats=statistics.path)
    assert len(list((statistics.path / "spectra").iterdir())) == 2  # another metric, other spectra


@pytest.mark.parametrize("family", FAMILIES)
def test_applied_gives_the_dense_model_back(family, calibrated):
    dense = model(family)
    before, config, expected = weights(dense), dense.config.to_dict(), logits(dense)
    attributes = set(vars(dense))
    with compression(dense, "jw-svd", stats=calibrated[family]) as prepared:
        with prepared.applied(prepared.plan(0.5)) as small:
            assert low_rank(small)
            assert small.config.quantization_config.ranks
            assert not torch.equal(logits(small), expected)
        assert_same(dense, before)
        with pytest.raises(KeyError, match="inside"), prepared.applied(prepared.plan(0.4)):
            raise KeyError("inside")
    assert_same(dense, before)
    assert torch.equal(logits(dense), expected)
    assert dense.config.to_dict() == config
    assert not hasattr(dense.config, "quantization_config")
    assert getattr(dense, "hf_quantizer", None) is None
    assert {name for name in set(vars(dense)) - attributes if vars(dense)[name]} == set()


def test_applied_restores_after_a_factor_that_is_not_finite(calibrated):
    dense = model("llama")
    before = weights(dense)
    with compression(dense, "svd-llm", stats=calibrated["llama"]) as prepared:
        plan = prepared.plan(0.5)
        last = plan.changed[-1]
        kept = prepared.spectra.spectrum(last)
        real = kept.sides

        def broken():
            P, Q = real()
            return P * torch.nan, Q

        kept.sides = broken
        with pytest.raises(NumericalError, match=f"{last}: its factor A holds NaN"):
            prepared.apply(plan)
        assert not stored_layers(prepared.model)
        with pytest.raises(NumericalError, match=f"{last}: its factor A holds NaN"), prepared.applied(plan):
            pass
    assert_same(dense, before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_checkpoint_is_the_factored_model_and_its_plan(family, dtype, words, tmp_path):
    given = {"processor": processor(family), "text": words, "samples": 6, "seqlen": 16}
    model(family, dtype).save_pretrained(tmp_path / "dense")
    dense = load(tmp_path / "dense")  # a cast alone would round the rotary frequencies too, which no file holds
    small = compress(dense, tmp_path / "small", recipe="jw-svd", retain=0.6, **given)
    again = load(tmp_path / "small")
    assert torch.equal(logits(again), logits(small))
    assert next(again.parameters()).dtype == dtype
    parts = anatomy(model(family, dtype))
    content = json.loads((tmp_path / "small" / "plan.json").read_text())
    plan = Plan.read(tmp_path / "small" / "plan.json", parts)
    assert {name: layer.spec for name, layer in low_rank(again).items()} == {
        n: plan.linears[n].spec for n in plan.changed
    }
    assert {name: row["bytes"] for name, row in content["linears"].items()} == {
        name: row.bytes for name, row in plan.linears.items()
    }
    stored = load_file(tmp_path / "small" / "model.safetensors")
    factor_bytes = sum(
        t.numel() * t.element_size() for name, t in stored.items() if name.endswith((".A.weight", ".B.weight"))
    )
    assert factor_bytes == sum(plan.linears[name].bytes for name in plan.changed)
    assert linear_bytes(again, plan.linears) == plan.bytes <= 0.6 * plan.dense_bytes
    record = read_provenance(tmp_path / "small")
    assert record["bytes"] == {"linears": plan.bytes, "linears_dense": plan.dense_bytes}
    assert record["retention"]["bytes"] == plan.bytes / plan.dense_bytes == record["retention"]["params"]
    tensors = sum(p.numel() * p.element_size() for p in again.parameters())
    whole = sum(p.numel() * p.element_size() for p in model(family, dtype).parameters())
    assert record["retention"]["checkpoint"] == pytest.approx(tensors / whole)
    assert record["recipe"]["name"] == "jw-svd"
    assert record["data"]["text"] == "words.txt"  # and not where it lies on this machine


def test_an_edited_plan_is_obeyed(calibrated, tmp_path):
    with compression(model("llama"), "svd-llm", stats=calibrated["llama"]) as prepared:
        content = json.loads(prepared.plan(0.5).json())
    first, second = list(content["linears"])[:2]
    content["linears"][first]["rank"] = 3
    content["linears"][second] = {"form": "dense", "bytes": 0, "dense_bytes": 0}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    small = compress(model("llama"), tmp_path / "out", recipe="svd-llm", plan=path, stats=calibrated["llama"])
    assert low_rank(small)[first].rank == 3
    assert second not in low_rank(small)
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["linears"][first]["rank"] == 3
    as_object = Plan.read(path, anatomy(model("llama")))
    same = compress(model("llama"), recipe="svd-llm", plan=as_object, stats=calibrated["llama"])
    assert torch.equal(logits(same), logits(small))
    as_object.linears["attic"] = as_object.linears[first]
    with pytest.raises(BudgetError, match="plans for 'attic', which the model lacks"):
        compress(model("llama"), recipe="svd-llm", plan=as_object, stats=calibrated["llama"])


def test_dearer_images_move_bytes_to_the_tower(words, tmp_path):
    """The tower does nothing to text, so that its bytes grow with the price of image loss, within one budget."""
    one = model("llava")
    options = {"processor": processor("llava"), "text": words, "samples": 4, "seqlen": 8, "curvature": True}
    statistics = calibrate(one, tmp_path / "stats", **options)
    kept = []
    for price in (0.01, 1.0, 100.0):
        with compression(one, "curvature", stats=statistics, changes={"metric.image_price": price}) as prepared:
            plan = prepared.plan(0.5)
        assert plan.bytes <= 0.5 * plan.dense_bytes
        kept.append(sum(plan.linears[linear.name].bytes for linear in prepared.parts.in_place("tower")))
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


def test_places_that_a_recipe_leaves_out_stay_dense(calibrated):
    small = compress(
        model("llava"),
        recipe="jw-svd",
        retain=0.7,
        stats=calibrated["llava"],
        changes={"allocation.places": ["backbone"]},
    )
    places = {anatomy(model("llava")).linear(name).place for name in low_rank(small)}
    assert places == {"backbone"}
    with pytest.raises(BudgetError, match=r"linears stay dense \(outside tower\) and take"):
        compress(
            model("llava"), recipe="jw-svd", retain=0.3, stats=calibrated["llava"],
            changes={"allocation.places": ["tower"]},
        )  # fmt: skip
    with pytest.raises(BudgetError, match=r"every linear of the model stays dense \(outside tower\)"):
        compress(
            model("llama"), recipe="jw-svd", retain=0.3, stats=calibrated["llama"],
            changes={"allocation.places": ["tower"]},
        )  # fmt: skip


def test_a_model_is_compressed_from_its_directory(words, tmp_path):
    model("llava").save_pretrained(tmp_path / "dense")
    llava_processor().save_pretrained(tmp_path / "dense")
    options = {"text": words, "samples": 4, "seqlen": 16, "retain": 0.5}
    small = compress(tmp_path / "dense", tmp_path / "a", **options)
    compress(load(tmp_path / "dense"), tmp_path / "b", processor=tmp_path / "dense", **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()
    }
    assert torch.equal(logits(load(tmp_path / "b")), logits(small))
    with pytest.raises(SpectrimError, match="compressed already"):
        compress(tmp_path / "a", tmp_path / "c", **options)


def test_spectra_go_on_after_what_is_there(words, tmp_path, monkeypatch):
    options = {"processor": word_tokenizer(), "text": words, "samples": 4, "seqlen": 16}
    statistics = calibrate(model("llama"), tmp_path / "stats", **options)
    real, made = spectra.decompose, []

    def dies(*arguments):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(1)
        return real(*arguments)

    monkeypatch.setattr(spectra, "decompose", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(model("llama"), recipe="svd-llm", retain=0.5, stats=statistics)
    files = sorted((statistics.path / "spectra").rglob("*"))
    kept = {path: path.stat().st_mtime_ns for path in files if path.is_file()}
    assert len(kept) == 5
    monkeypatch.setattr(spectra, "decompose", real)
    small = compress(model("llama"), recipe="svd-llm", retain=0.5, stats=statistics)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = calibrate(model("llama"), tmp_path / "other", **options)
    fresh = compress(model("llama"), recipe="svd-llm", retain=0.5, stats=again)
    assert torch.equal(logits(small), logits(fresh))
    damaged = next(iter(kept))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(StatisticsError, match="cannot be read"):
        compress(model("llama"), recipe="svd-llm", retain=0.5, stats=statistics)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    dense = model("llama")
    name = anatomy(dense).linears[4].name
    with torch.no_grad():
        dense.get_submodule(name).weight[1, 2] = value
    with pytest.raises(NumericalError, match=f"the weight of {name} holds NaN or infinity"):
        compress(dense, recipe="svd", retain=0.5)
    assert not low_rank(dense)


def test_sensitivity_search_follows_the_measured_loss(calibrated):
    dense = model("llama")
    before = weights(dense)
    changes = {"allocation.rule": "sensitivity"}
    with compression(dense, "asvd", stats=calibrated["llama"], processor=word_tokenizer(), changes=changes) as prepared:
        plan = prepared.plan(0.5)
        assert_same(dense, before)
        uniform = compression(model("llama"), "asvd", stats=calibrated["llama"])
        with uniform as other:
            assert plan.linears != other.plan(0.5).linears
        assert plan.bytes <= 0.5 * plan.dense_bytes
        prepared.apply(plan)
    assert logits(dense).isfinite().all()
    with (
        compression(model("llama"), "asvd", stats=calibrated["llama"], changes=changes) as prepared,
        pytest.raises(RecipeError, match="needs text statistics and the model's processor"),
    ):
        prepared.plan(0.5)


def test_what_cannot_be_done_is_said(calibrated, tmp_path):
    llama, stats = model("llama"), calibrated["llama"]
    for retain in (0, -1, 1.01, float("nan")):
        with pytest.raises(BudgetError, match="is impossible"):
            compress(llama, recipe="svd", retain=retain)
    least = sum(4 * (linear.out_features + linear.in_features) for linear in anatomy(llama).linears)
    with pytest.raises(BudgetError, match=f"is less than the {least} of the smallest options; raise --retain"):
        compress(llama, recipe="svd", retain=0.001)
    for options in ({}, {"retain": 0.5, "plan": tmp_path / "plan.json"}):
        with pytest.raises(BudgetError, match="either a limit"):
            compress(llama, recipe="svd", **options)
    with pytest.raises(RecipeError, match="needs samples; give statistics, or the model's processor"):
        compress(llama, recipe="svd-llm", retain=0.5)
    with pytest.raises(StatisticsError, match="of another model"):
        compress(model("llama", torch.bfloat16), recipe="svd-llm", retain=0.5, stats=stats)
    assert not low_rank(llama)


@pytest.mark.parametrize("retain", [0.5, 0.05])
def test_a_compressed_model_is_refused(retain):
    small = compress(model("llama"), recipe="svd", retain=0.5)
    with pytest.raises((RecipeError, ModelError), match="compressed already"):
        compress(small, recipe="svd", retain=retain)
    dense = small.dequantize()
    assert low_rank(compress(dense, recipe="svd", retain=0.4))
