"""Plans and whole compressions with pivoted storage."""

import json

import pytest
import torch
from safetensors.torch import load_file

import families
from compressed import config_of, logits, low_rank
from helpers.plans import linear, menus, shaped, spectrum
from spectrim.anatomy import anatomy
from spectrim.checkpoint import load, read_provenance
from spectrim.errors import BudgetError
from spectrim.pipeline import compress, compression
from spectrim.plan.plan import Plan, plan_row
from spectrim.recipe import Recipe, builtin_names

PIVOTED = {"storage.pivoted": True}


def pivoted(plan: Plan) -> set[str]:
    return {name for name, row in plan.linears.items() if row.spec.get("pivoted")}


def test_pivots_pay_from_the_rank_at_which_they_spare_more_than_their_indices():
    for dtype, first in ((torch.bfloat16, 3), (torch.float32, 2)):
        (offered,) = menus([shaped(linear(0, 9, 12, dtype), spectrum(9, 0), pivoted=True)])
        specs = [offered.option(number)[1] for number in range(len(offered.bytes))]
        assert [(x["rank"], x["pivoted"]) for x in specs if x] == [(k, k >= first) for k in range(1, len(specs))]
        assert len(specs) > first + 2
    (by_head,) = menus([shaped(linear(0, 9, 12, heads=3), torch.ones(3, 3).double(), pivoted=True)])
    assert not any(by_head.option(number)[1].get("pivoted", False) for number in range(len(by_head.bytes)))


def test_edited_pivots_are_obeyed_or_refused(parts, tmp_path):
    first, second = parts.linears[:2]
    q = next(x for x in parts.linears if x.role == "q")
    rows = {
        first.name: plan_row(first, "low-rank", {"rank": 7, "pivoted": True}),
        second.name: plan_row(second, "low-rank", {"rank": 5}),
    }
    plan = Plan(recipe="svd", linears=rows)
    path = tmp_path / "plan.json"

    def read(**changes) -> Plan:
        content = json.loads(plan.json())
        content["linears"][first.name].update(changes)
        path.write_text(json.dumps(content))
        return Plan.read(path, parts)

    out, size = first.out_features, first.in_features
    assert pivoted(read()) == {first.name}
    assert read().linears[first.name].bytes == 4 * 7 * (size + out - 7) + 4 * 7
    assert read(rank=9).linears[first.name].bytes == 4 * 9 * (size + out - 9) + 4 * 9
    assert read(pivoted=False).linears[first.name].bytes == 4 * 7 * (size + out)
    content = json.loads(plan.json())
    content["linears"][first.name] = {"rank": None, "pivoted": True, "bytes": 0, "dense_bytes": 0}  # of version 1
    path.write_text(json.dumps(content))
    dense = Plan.read(path, parts)
    assert pivoted(dense) == set()
    assert dense.linears[first.name] == plan_row(first)
    with pytest.raises(BudgetError, match=f"stores '{first.name}' .*{out} pivots of {out} rows are the dense weight"):
        read(rank=out)
    headed = plan.model_copy(update={"linears": {q.name: plan_row(q, "low-rank", {"rank": [3] * q.heads})}})
    broken = json.loads(headed.json())
    broken["linears"][q.name]["pivoted"] = True
    path.write_text(json.dumps(broken))
    with pytest.raises(BudgetError, match=f"stores '{q.name}' .*pivots are rows of a whole layer.*; correct it, or"):
        Plan.read(path, parts)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compression_from_end_to_end(family, dtype, tmp_path):
    families.FAMILIES[family]().to(dtype).save_pretrained(tmp_path / "dense")
    dense = load(tmp_path / "dense")
    linears = anatomy(dense).linears
    small = compress(dense, tmp_path / "small", recipe="svd", retain=0.6, changes=PIVOTED)
    layers = low_rank(small)
    assert all(layer.pivots is not None for layer in layers.values())
    loaded = load(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(small))
    assert {str(layer.pivots.dtype) for layer in low_rank(loaded).values()} == {"torch.int32"}
    assert {layer.pivots.dtype for layer in low_rank(load(tmp_path / "small", dtype=torch.float16)).values()} == {
        torch.int32
    }
    # Bytes of the plan are those of the file.
    names = config_of(tmp_path / "small")["quantization_config"]
    assert names["pivoted"] == sorted(names["ranks"])
    kinds = (".A.weight", ".B.weight", ".pivots")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    stored = {key: t.nbytes for key, t in tensors.items() if key.endswith(kinds)}
    kept = sum(x.nbytes for x in linears if x.name not in layers)
    plan = Plan.read(tmp_path / "small" / "plan.json", anatomy(load(tmp_path / "dense")))
    assert pivoted(plan) == layers.keys()
    assert sum(stored.values()) + kept == plan.bytes <= 0.6 * plan.dense_bytes
    record = read_provenance(tmp_path / "small")
    numbers = sum(t.numel() for key, t in tensors.items() if key.endswith(kinds[:2])) + kept // dtype.itemsize
    assert record["retention"]["params"] == pytest.approx(numbers / sum(x.params for x in linears))
    assert record["recipe"]["storage"] == {
        "pivoted": True,
        "multiple": 1,
        "heads": "free",
        "experts": "each",
        "narrow": False,
    }
    # The same plan, obeyed by another recipe.
    again = compress(load(tmp_path / "dense"), recipe="jw-svd", plan=plan, changes={"metric.kind": "identity"})
    assert torch.equal(logits(again), logits(small))


def test_a_model_is_dense_again_after_the_block():
    model = families.FAMILIES["llama"]()
    before = logits(model)
    with compression(model, "svd", changes=PIVOTED) as prepared:
        with prepared.applied(prepared.plan(0.5)) as small:
            assert any(layer.pivots is not None for layer in low_rank(small).values())
        plain = prepared.plan(1.0)
    assert torch.equal(logits(model), before)
    assert pivoted(plain) == set()


def test_storage_is_a_part_of_every_recipe():
    for name in builtin_names():
        assert Recipe.read(name).storage.pivoted == (name == "spectrim")
        assert Recipe.read(name, PIVOTED).storage.pivoted
        assert not Recipe.read(name, {"storage.pivoted": False}).storage.pivoted
