"""Input embedding and output head in integers: what a model computes with them, in files and back, and their price."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import families
import spectrim
from helpers.command import run
from helpers.samples import processor
from spectrim.anatomy import anatomy
from spectrim.bench.engines import held_bytes
from spectrim.checkpoint import attach, load, load_processor, save
from spectrim.demo import resolve
from spectrim.errors import BudgetError, ModelError, RecipeError
from spectrim.evaluate.footprint import stored_bytes
from spectrim.pipeline import compression
from spectrim.pipeline.tables import Tables, grid_of, least_bytes, stored_as
from spectrim.plan.plan import Plan
from spectrim.recipe import QuantizePart, Recipe
from spectrim.storage import filled, form, share
from spectrim.storage.base import checked_linear
from spectrim.storage.embedding import PackedEmbedding, SharedHead
from spectrim.storage.packed import PackedLinear

WITH_TABLES = [name for name, make in families.FAMILIES.items() if anatomy(make()).tables]


def stored(model, bits, symmetric=True):
    """The model with its tables in integers, and a copy that computes with the same numbers in dense weights."""
    part = QuantizePart(bits="auto", embeddings=bits, group=32, symmetric=symmetric)
    recipe = Recipe.read("svd", {"quantize.embeddings": bits, "quantize.group": 32, "quantize.symmetric": symmetric})
    parts, dense = anatomy(model), copy.deepcopy(model)
    tables = Tables(model, parts, recipe, None, None, None)
    for name, row in tables.rows({}).items():
        layer = filled(checked_linear(model, name, row.form), row.form, row.spec, tables.make(name, row))
        with torch.no_grad():
            dense.get_submodule(name).weight.copy_(layer.product())
        model.set_submodule(name, layer)
        assert row.bytes == form(row.form).nbytes(parts.tables[0], row.spec) or len(parts.tables) > 1
    assert part.embeddings == bits
    share(model)
    attach(model)
    return model, dense


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", WITH_TABLES)
def test_a_model_computes_with_the_rounded_numbers_in_memory_and_from_files(family, tmp_path):
    model = families.FAMILIES[family]().eval()
    inputs, parts = families.example_inputs(model), anatomy(model)
    before = stored_bytes(save(copy.deepcopy(model), tmp_path / "dense"))
    model, dense = stored(model, 8)
    found, expected = logits(model, inputs), logits(dense.eval(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    saving = sum(table.nbytes - least_bytes(table, QuantizePart(embeddings=8, group=32)) for table in parts.tables)
    after = stored_bytes(save(model, tmp_path / "small"))
    assert before - after > saving - 4096  # names, and what the config says
    again = spectrim.load(tmp_path / "small").eval()
    torch.testing.assert_close(logits(again, inputs), found, rtol=1e-5, atol=1e-6)
    again.dequantize()
    assert not [module for module in again.modules() if isinstance(module, PackedLinear | SharedHead)]
    torch.testing.assert_close(logits(again, inputs), found, rtol=1e-4, atol=1e-5)
    again.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(spectrim.load(tmp_path / "plain").eval(), inputs), found, rtol=1e-4, atol=1e-5)
    if any(table.shared for table in parts.tables):
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_tied_and_untied_models_have_other_tables():
    kinds = {name: [table.role for table in anatomy(families.FAMILIES[name]()).tables] for name in WITH_TABLES}
    assert ["embedding+head"] in kinds.values()
    assert ["embedding", "head"] in kinds.values()
    assert len(WITH_TABLES) > 20


def test_a_scaled_embedding_is_no_table():
    model = families.FAMILIES["gemma3"]()
    assert type(model.get_input_embeddings()) is not nn.Embedding
    assert not any(table.role.startswith("embedding") for table in anatomy(model).tables)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runtime", ["reference", "auto", "memory"])
def test_rows_and_logits_in_every_runtime(bits, symmetric, dtype, runtime, tmp_path):
    model = families.FAMILIES["llama"]().to(dtype).eval()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    inputs = families.example_inputs(model)
    model, dense = stored(model, bits, symmetric)
    save(model, tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lm_head" in name]  # noqa: SIM118 - no mapping
    again = spectrim.load(tmp_path / "m", runtime=runtime).eval()
    table = again.get_input_embeddings()
    assert isinstance(table, PackedEmbedding)
    assert table.shared
    assert held_bytes(table) <= 1.15 * sum(tensor.nbytes for tensor in table.state_dict().values())
    ids = torch.tensor([[0, 5, 5], [95, 1, 0]])
    torch.testing.assert_close(table(ids), nn.functional.embedding(ids, dense.get_input_embeddings().weight))
    within = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(logits(again, inputs), logits(dense, inputs), **within)
    out = again.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        spectrim.load(tmp_path / "again", runtime="reference").state_dict()["model.embed_tokens.weight_packed"],
        spectrim.load(tmp_path / "m", runtime="reference").state_dict()["model.embed_tokens.weight_packed"],
    )


@pytest.fixture(scope="module")
def prepared():
    """The built-in model, calibrated once, whose tables a size may round."""
    changes = {"quantize.bits": "auto", "quantize.embeddings": "auto", "compensate.kind": "none"}
    changes["allocation.places"] = ["backbone"]  # fewer linears, whose options take the time
    how = {"processor": load_processor(resolve("demo")), "samples": 16, "text": "builtin", "images": "builtin"}
    with compression(load(resolve("demo")), "spectrim", changes=changes, **how) as found:
        yield found


@pytest.mark.slow
def test_a_size_rounds_what_costs_least_and_everything_counts(prepared, tmp_path):
    dense = stored_bytes(prepared_dense(tmp_path))
    chosen = {}
    for size in (0.9, 0.5, 0.35):
        plan = prepared.plan(size=int(size * dense))
        (row,) = plan.tables.values()
        chosen[size] = row.form, row.spec.get("bits")
        assert plan.loss == pytest.approx(sum(row.loss for row in plan.rows.values()))
        assert 0.97 * size * dense < prepared.sizes.of(plan) <= size * dense
    assert stored_bytes(prepared.save(plan, tmp_path / "m")) <= 0.35 * dense
    assert chosen[0.9] == ("dense", None)
    assert chosen[0.35] == ("integer-embedding", 4)
    record = json.loads((tmp_path / "m" / "spectrim.json").read_text())
    assert record["tables"].keys() == plan.tables.keys()
    read = Plan.read(tmp_path / "m" / "plan.json", prepared.parts)
    assert read.tables[next(iter(read.tables))].spec == row.spec
    floats = prepared.plan(0.4)
    assert not floats.tables  # a share is one of the linears


def prepared_dense(folder):
    return save(load(resolve("demo")), folder / "dense")


@pytest.mark.slow
def test_prices_are_the_measured_divergence(prepared):
    """None where a table stays dense, and as squared steps of the grids in 8 and 4 bits."""
    (menu,) = prepared._tables.menus.values()
    assert menu.error[0] == 0
    assert 0 < menu.error[1] < 0.01 < menu.error[2] / menu.error[1]  # dense, 8 and 4 bits
    assert 50 < menu.error[2] / menu.error[1] < 2000  # squared steps: 16² times
    measured, dense = (model.get_input_embeddings().weight for model in (prepared.model, load(resolve("demo"))))
    assert torch.equal(measured, dense)  # nothing rounded is left behind


def test_what_cannot_be_is_said():
    with pytest.raises(RecipeError, match="embeddings"):
        Recipe.read("svd", {"quantize.embeddings": 3})
    model = families.FAMILIES["llama"]()
    with pytest.raises(ModelError, match="shared"):
        form("integer-embedding").build(model.get_input_embeddings(), {"bits": 8, "group": 32, "symmetric": True})
    with pytest.raises(ModelError, match=r"not an nn\.Embedding"):
        checked_linear(model, "lm_head", "integer-embedding")
    plan = Plan(recipe="svd", linears={}, tables={"lm_hat": {"form": "integers", "bits": 8, "group": 32, "bytes": 1,
                                                            "dense_bytes": 2}})  # fmt: skip
    with pytest.raises(BudgetError, match="lm_hat"):
        plan.fitted(anatomy(model))


@pytest.mark.parametrize(
    ("width", "group", "expected"), [(576, 128, 64), (64, 128, 64), (100, 128, None), (256, 32, 32)]
)
def test_groups_divide_the_width(width, group, expected):
    table = anatomy(families.FAMILIES["llama"]()).tables[0]
    table = type(table)(table.name, table.place, None, table.role, 10, width, None, torch.float32)
    assert grid_of(table, 4, QuantizePart(group=group)).group == expected
    assert stored_as(table, 4, QuantizePart(group=group))[1]["group"] == expected


def test_the_command_line_leaves_them_dense_where_it_is_told_to(tmp_path, words, capsys):
    source = save(families.FAMILIES["llama"](), tmp_path / "model")
    processor("llama").save_pretrained(source)
    size = int(0.5 * stored_bytes(source))
    given = ["--size", str(size), "--recipe", "spectrim", "--text", words, "--samples", "8", "--seqlen", "32"]
    for name, more in {"all": [], "dense": ["--set", "quantize.embeddings=null"]}.items():
        code, _, err = run(capsys, "compress", str(source), "-o", str(tmp_path / name), *given, *more)
        assert code == 0, err
        assert ("tables" in json.loads((tmp_path / name / "plan.json").read_text())) == (name == "all")
