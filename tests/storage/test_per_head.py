"""Factoring head by head: each head by itself, put together again, and through checkpoints."""

import pytest
import torch

import families
from compressed import assembled, logits, low_rank
from helpers.matrices import normal
from helpers.samples import llava_processor, word_tokenizer
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.checkpoint import load
from spectrim.maths.decompose import OutputMetric, Spectrum, decompose, factors, head_ranks, sides
from spectrim.maths.roots import BlockRoot
from spectrim.metrics.metric import layer_metric
from spectrim.metrics.spectra import make_spectra
from spectrim.pipeline import compress, compression
from spectrim.recipe import Recipe
from spectrim.storage.layers import LowRankLinear

LASER = Recipe.read("laser").metric


def output_metric(heads: int, size: int) -> OutputMetric:
    blocks = [normal(size + 3, size, seed=90 + h) for h in range(heads)]
    nats = torch.linspace(0.5, 3.0, heads, dtype=torch.float64)
    return OutputMetric(tuple(BlockRoot((X.T @ X)[None]) for X in blocks), nats)


def mine(found: Spectrum, head: int) -> torch.Tensor:
    return (found.head == head).nonzero()[:, 0]


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize(("heads", "size", "columns"), [(4, 3, 7), (2, 6, 4), (3, 1, 5)])
def test_heads_are_decomposed_by_themselves(heads, size, columns, curved):
    W, X = normal(heads * size, columns), normal(40, columns, seed=1)
    output = output_metric(heads, size) if curved else None
    found = decompose(W, X.T @ X, output, heads)
    each = min(size, columns)
    assert found.head.bincount().tolist() == [each] * heads
    for head in range(heads):
        part = None if output is None else OutputMetric(output.roots[head : head + 1], output.nats[head : head + 1])
        alone, chosen = decompose(W[head * size : (head + 1) * size], X.T @ X, part), mine(found, head)
        torch.testing.assert_close(found.s[chosen], alone.s)
        rows = W[head * size : (head + 1) * size]
        for k in range(1, each + 1):
            ours = sides(rows, found.P[:, chosen[:k]], None if found.Q is None else found.Q[:, chosen[:k]])
            theirs = sides(rows, alone.P[:, :k], None if alone.Q is None else alone.Q[:, :k])
            torch.testing.assert_close(ours[0] @ ours[1], theirs[0] @ theirs[1])
        if curved:
            torch.testing.assert_close(found.loss[chosen], alone.loss)
    # Each head's first direction comes first, then all others by what they cost.
    assert sorted(found.head[:heads].tolist()) == list(range(heads))
    cost = found.loss if curved else found.s
    assert (cost[heads:].diff() < 0).all()
    for head in range(heads):
        assert cost[:heads][found.head[:heads] == head] == cost[found.head == head].max()


@pytest.fixture(scope="module")
def statistics(words, tmp_path_factory) -> dict[str, Statistics]:
    found = {}
    for family, processor in (("llama", word_tokenizer()), ("llava", llava_processor())):
        home = tmp_path_factory.mktemp(family)
        options = {"processor": processor, "text": words, "samples": 6, "seqlen": 12}
        model = families.FAMILIES[family]()
        found[family] = calibrate(model, home / "s", **options, curvature=True, answer_tokens=3)
    return found


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_spectra_on_disk_make_layers(family, statistics, tmp_path):
    """Ranks and directions of each count, as factors of a layer: P Qᵀ W of every head, and W from all directions."""
    model = families.FAMILIES[family]()
    parts = anatomy(model)
    spectra = make_spectra(model, parts, LASER, statistics[family], tmp_path / "spectra")
    seen = set()
    for one in parts.linears:
        heads = one.per_head or 1
        assert spectra.heads(one.name) == heads
        if heads == 1 or one.block.endswith(".0"):
            continue
        seen.add((one.place, one.role, heads))
        W = model.get_submodule(one.name).weight.detach().double()
        metric = layer_metric(LASER, one, statistics[family])
        found = decompose(W, metric.value, metric.output, heads)
        for count in (heads, heads + 3, len(found.s) // 2, len(found.s)):
            rank = spectra.rank(one.name, count)
            assert len(rank) == heads
            assert sum(rank) == count
            layer = LowRankLinear(one.in_features, one.out_features, rank, bias=False, dtype=torch.float64)
            layer.load_factors(*factors(W, *spectra.directions(one.name, rank)))
            made = layer.to_dense().weight
            for head, k in enumerate(rank):
                chosen, rows = mine(found, head)[:k], W.chunk(heads)[head]
                expected = found.P[:, chosen] @ (found.Q[:, chosen].T @ rows)
                torch.testing.assert_close(made.chunk(heads)[head], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made, W, rtol=1e-4, atol=1e-5)
    backbone = {("backbone", "q", 4), ("backbone", "k", 2), ("backbone", "v", 2)}
    assert seen == backbone | ({("tower", role, 2) for role in "qkv"} if family == "llava" else set())


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_laser_from_end_to_end(family, statistics, tmp_path):
    model = families.FAMILIES[family]()
    compressed = compress(model, tmp_path / "small", recipe="laser", retain=0.5, stats=statistics[family])
    before = logits(compressed)
    loaded = load(tmp_path / "small")
    assert torch.equal(logits(loaded), before)
    layers = low_rank(loaded)
    dense = families.FAMILIES[family]()
    by_head = {x.name: x.per_head for x in anatomy(dense).linears if x.per_head}
    assert layers.keys() & by_head.keys()
    for name, layer in layers.items():
        assert len(head_ranks(layer.rank)) == by_head.get(name, 1)
        assert assembled(layer).isfinite().all()
    stored = sum(p.numel() for layer in layers.values() for key, p in layer.named_parameters() if key != "bias")
    kept = sum(x.params for x in anatomy(dense).linears if x.name not in layers)
    whole = sum(x.params for x in anatomy(dense).linears)
    assert 0.45 * whole < stored + kept <= 0.5 * whole


@pytest.mark.parametrize("family", ["llama", "llava"])
@pytest.mark.parametrize("recipe", ["laser", "curvature"])
def test_more_budget_means_less_predicted_loss(family, recipe, statistics):
    with compression(families.FAMILIES[family](), recipe, stats=statistics[family]) as prepared:
        found = [prepared.plan(retain) for retain in (0.3, 0.5, 0.7, 0.9, 1.0)]
    losses = [plan.loss for plan in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 2 * losses[2] > 0
    assert losses[-1] == 0
    for plan in found:
        assert plan.bytes <= plan.retain * plan.dense_bytes
