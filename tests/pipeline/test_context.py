"""A size that holds the key/value cache as well: what is counted, and what it moves."""

import pytest
import torch

import families
from helpers.command import run
from spectrim import LatentCache
from spectrim.anatomy import anatomy
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.errors import BudgetError
from spectrim.pipeline import compression
from spectrim.pipeline.budget import Budget
from spectrim.pipeline.context import CacheBytes, Context
from spectrim.plan.plan import Plan, plan_row
from spectrim.trace import few_tokens


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    source = resolve("demo")
    how = {"samples": 4, "text": "builtin", "images": "builtin", "keep": tmp_path_factory.mktemp("statistics")}
    with compression(load(source), "laser", processor=load_processor(source), **how) as found:
        yield found


def test_files_and_cache_together_take_no_more_than_the_size(prepared):
    context = Context(8192, 4)
    sizes, cache = prepared.sizes, prepared.sizes.cache(Budget(size=1, context=context))
    assert cache.dense == 8192 * 4 * 2 * 6 * 128 * 2  # keys and values of 6 layers, 128 numbers of 2 bytes each
    for size in (30_000_000, 60_000_000, 100_000_000):
        plan = prepared.plan(size=size, context=context)
        found = sizes.of(plan) + cache.under(plan)
        assert 0.97 * size < found <= size


def test_ranks_of_keys_and_values_are_bought_against_the_cache(prepared):
    def ranks(plan):
        rows = [plan.linears[x.name] for x in prepared.parts.in_place("backbone") if x.role in ("k", "v")]
        return sum(128 if row.rank is None else row.rank for row in rows)

    long = prepared.plan(size=30_000_000, context=Context(8192, 4))
    short = prepared.plan(size=prepared.sizes.of(long))  # the same files, whatever the cache
    assert ranks(long) < ranks(short)
    assert long.loss > short.loss


def test_the_cache_is_as_large_as_was_counted(prepared):
    plan = prepared.plan(size=30_000_000, context=Context(8192, 4))
    tokens = 24
    counted = CacheBytes(prepared.model, prepared.parts, Context(tokens)).under(plan)
    with prepared.applied(plan) as model, torch.no_grad():
        cache = LatentCache(model)
        model(**few_tokens(model, 1) | {"input_ids": torch.arange(tokens)[None] + 5}, past_key_values=cache)
        turns = sum(rows.nbytes for table in cache.tables for rows in table.rows.values())  # one for all layers
        assert cache.nbytes - turns == counted


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "llava", "mistral"])
def test_a_dense_cache_is_as_transformers_has_it(family):
    model = families.FAMILIES[family]().eval()
    tokens = 20
    with torch.no_grad():
        out = model(input_ids=torch.arange(tokens)[None] % 50 + 3, use_cache=True)
    held = sum(x.numel() * x.element_size() for layer in out.past_key_values.layers for x in (layer.keys, layer.values))
    found = CacheBytes(model, anatomy(model), Context(tokens)).dense
    assert held <= found <= held * 1.2  # a sliding layer of transformers keeps one token less than its window


def test_sliding_layers_keep_their_window():
    model = families.FAMILIES["mistral"]()
    model.config.layer_types, model.config.sliding_window = ["sliding_attention", "full_attention"], 8
    parts = anatomy(model)
    k = [x for x in parts.linears if x.role == "k"]
    cache = CacheBytes(model, parts, Context(100, 3))
    assert [cache.of(x) for x in k] == [
        x.out_features * x.dtype.itemsize * 3 * n for x, n in zip(k, (8, 100), strict=True)
    ]
    assert cache.of(next(x for x in parts.linears if x.role == "q")) == 0


def test_only_ranks_by_head_make_latents():
    model = families.FAMILIES["llama"]()
    parts = anatomy(model)
    cache = CacheBytes(model, parts, Context(10))
    k = next(x for x in parts.linears if x.role == "k")
    by_head, whole = ({"rank": rank, "pivoted": False} for rank in ([3, 4], 7))
    assert cache.of(k, "low-rank", by_head) == 10 * 7 * k.dtype.itemsize
    assert cache.of(k, "low-rank", whole) == 10 * k.out_features * k.dtype.itemsize == cache.of(k)
    rows = {x.name: plan_row(x) for x in parts.linears} | {k.name: plan_row(k, "low-rank", by_head)}
    saved = cache.of(k) - cache.of(k, "low-rank", by_head)
    assert cache.under(Plan(recipe="laser", linears=rows)) == cache.dense - saved


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"retain": 0.5, "context": Context(10)}, "counted in a size alone"),
        ({"size": "500MB", "context": Context(8192)}, "the dense model with a cache of 8192 tokens takes"),
        ({"size": "3MB", "context": Context(8192, 16)}, r"a cache of 8192 tokens of 16 sequences.*give at least"),
    ],
)
def test_what_cannot_be_is_said(prepared, limit, message):
    with pytest.raises(BudgetError, match=message):
        prepared.plan(**limit)


def test_a_model_without_keys_is_refused():
    model = families.FAMILIES["phi3"]()
    with pytest.raises(BudgetError, match="no linears of keys"):
        CacheBytes(model, anatomy(model), Context(5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "4MB", "--context", "0"], "a context of 0 is impossible"),
        (["--size", "4MB", "--context", "5", "--batch", "-1"], "a batch of -1 is impossible"),
        (["--size", "4MB", "--batch", "2"], "give --context beside --batch"),
        (["--retain", "0.5", "--context", "5"], "counted in a size alone"),
        (["--context", "5"], "counted in a size alone"),
    ],
)
def test_the_command_line_refuses_it_early(arguments, message, tmp_path, capsys):
    code, _, err = run(capsys, "compress", "demo", "-o", str(tmp_path / "m"), *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "m").exists()
