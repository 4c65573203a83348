"""Float factors: which ranks are options, what is made of them, and head by head through checkpoints."""

from itertools import product

import pytest
import torch

import families
from compressed import assembled, logits, low_rank
from helpers.matrices import metric, normal
from helpers.problems import lost, problem
from helpers.samples import llava_processor, word_tokenizer
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.checkpoint import load
from spectrim.errors import ModelError
from spectrim.linear import Linear
from spectrim.maths.alternating import alternate
from spectrim.maths.decompose import decompose, factors, head_ranks
from spectrim.metrics.metric import layer_metric
from spectrim.metrics.spectra import make_spectra
from spectrim.pipeline import compress, compression
from spectrim.recipe import Recipe, StoragePart
from spectrim.storage import form, made
from spectrim.storage.layers import LowRankLinear

LASER = Recipe.read("laser").metric
LOW_RANK = form("low-rank")


# ---- options ----


@pytest.mark.parametrize(("out", "size"), [(24, 32), (40, 32), (1, 8), (8, 1)])
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("multiple", [1, 5])
def test_every_rank_that_is_smaller_is_an_option(out: int, size: int, pivoted: bool, multiple: int) -> None:
    """In the smaller of both ways to store it, counted from the tensors of each."""
    given = problem(out, size, dtype=torch.bfloat16, storage=StoragePart(pivoted=pivoted, multiple=multiple))
    wanted = []
    for k in range(multiple, min(out, size) + 1, multiple):
        plain, by_pivots = 2 * k * (out + size), 2 * (k * size + (out - k) * k) + 4 * k
        through = pivoted and by_pivots < plain and k < out
        if min(plain, by_pivots if through else plain) < 2 * out * size:
            wanted.append((by_pivots if through else plain, {"rank": k, "pivoted": through}))
    options = LOW_RANK.options(given)
    assert [(int(n), options.spec(i)) for i, n in enumerate(options.bytes)] == wanted
    ranks = [spec["rank"] for _, spec in wanted]
    assert options.error.tolist() == pytest.approx([float(given.spectrum.loss[k:].sum()) for k in ranks])


def test_directions_of_heads_are_pooled() -> None:
    """One direction for each head at least, then those that cost most, whatever head they are of."""
    given = problem(24, 20, heads=4, storage=StoragePart(pivoted=True, multiple=8))
    options, each = LOW_RANK.options(given), 4 * (20 + 6)
    assert options.bytes.tolist() == [k * each for k in range(4, 19)]  # 19 · 26 are more than 24 · 20
    for number, count in enumerate(range(4, 19)):
        spec = options.spec(number)
        assert spec["pivoted"] is False
        assert sum(spec["rank"]) == count
        assert len(spec["rank"]) == 4
        assert min(spec["rank"]) >= 1


# ---- what is made ----


@pytest.mark.parametrize("pivoted", [False, True])
def test_factors_are_those_of_the_spectrum(pivoted: bool) -> None:
    given = problem()
    found = decompose(given.W, given.C, given.output)
    A, B = factors(given.W, found.s[:5], found.P[:, :5], found.Q[:, :5])
    tensors = made(given, "low-rank", {"rank": 5, "pivoted": pivoted})
    if not pivoted:
        torch.testing.assert_close(tensors["A.weight"], A.float(), rtol=0, atol=0)
        torch.testing.assert_close(tensors["B.weight"], B.float(), rtol=0, atol=0)
        return
    p = tensors["pivots"].long()
    others = [row for row in range(24) if row not in p.tolist()]
    torch.testing.assert_close(tensors["B.weight"].double(), (A @ B)[p], rtol=1e-5, atol=1e-6)
    product = tensors["A.weight"].double() @ tensors["B.weight"].double()
    torch.testing.assert_close(product, (A @ B)[others], rtol=1e-5, atol=1e-5)


def test_a_kept_spectrum_is_used() -> None:
    """Nothing is decomposed again, and nobody asks for the metrics."""
    given = problem()
    kept = given.spectrum

    def metrics():
        pytest.fail("the metrics were asked for")

    again = type(given)(given.linear, given.weight, metrics, given.storage, given.quantize, kept=kept)
    spec = LOW_RANK.options(again).spec(4)
    assert spec == {"rank": 5, "pivoted": False}
    assert torch.equal(made(again, "low-rank", spec)["A.weight"], made(given, "low-rank", spec)["A.weight"])


@pytest.mark.parametrize("heads", [1, 4])
def test_factors_are_fitted_in_turn_head_by_head(heads: int) -> None:
    """Each head by its own rows of the targets and its own output metric; the error to the targets falls."""
    given = problem(24, 20, heads=heads, dtype=torch.float64)
    rank = [2, 3, 1, 4] if heads > 1 else 7
    spec, second = {"rank": rank, "pivoted": False}, metric(20, seed=31) + 0.1 * torch.eye(20)
    T = given.W + 0.3 * normal(24, 20, seed=32)  # t = T x'
    before = made(given, "low-rank", spec)
    after = LOW_RANK.alternate(given, spec, second, T @ second, 2, torch.float64)
    assert after.keys() == before.keys()
    layers = []
    for tensors in (before, after):
        layer = LOW_RANK.build(torch.nn.Linear(20, 24, dtype=torch.float64, bias=False), spec)
        layer.load_state_dict(tensors)
        layers.append(layer)
    names = ["A"] if heads == 1 else [f"A.{head}" for head in range(heads)]
    starts = layers[0].B.weight.detach().split(head_ranks(layers[0].rank))
    for head, (name, B, rows) in enumerate(zip(names, starts, T.chunk(heads), strict=True)):
        A = before[f"{name}.weight"]
        one = alternate(A, B, second, rows @ second, rounds=2, output=given.output.roots[head])
        part = after["B.weight"].split(head_ranks(layers[0].rank))[head]
        torch.testing.assert_close(after[f"{name}.weight"] @ part, one[0] @ one[1])
    errors = [lost(type(given)(given.linear, lambda: T, lambda: (second, given.output), given.storage, given.quantize),
                   layer.product().detach()) for layer in layers]  # fmt: skip
    assert errors[1] < errors[0]


# ---- specs that cannot be ----


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "the rank None is impossible: ranks are whole numbers of at least 1"),
        ({"rank": 0}, "the rank 0 is impossible"),
        ({"rank": True}, "the rank True is impossible"),
        ({"rank": 25}, "the rank 25 is too large: it can have 24 at most"),
        ({"rank": [7, 1, 1, 1]}, "the rank 7 is too large: a head of it can have 6 at most"),
        ({"rank": [2, 3]}, "there are ranks for 2 heads and it has 4; give each one"),
        ({"rank": [1, 1, 1, 1], "pivoted": True}, "a layer that is factored head by head has none"),
        ({"rank": 24, "pivoted": True}, "24 pivots of 24 rows are the dense weight; keep the layer dense"),
        ({"rank": 4, "pivoted": 1}, "pivoted is true or false and grids are an object, not 1"),
        ({"rank": 4, "bits": 4}, "a layer of the form 'low-rank' has no 'bits'; take it out"),
        ({"rank": 4, "grids": {"A": {"bits": 4}}}, "it has grids for A, where they can be made for no part alone"),
        ({"rank": 4, "grids": {"B": {"bits": 4}}}, "parts B make the form 'integer-factors'; name that one"),
        ({"rank": 4, "grids": {"C": {"bits": 4}}}, "a layer of factors has no part 'C'; its parts are B, A and R"),
    ],
)
def test_a_spec_that_a_linear_cannot_have_is_named(spec, message: str) -> None:
    linear = Linear("a", "backbone", None, "q", 24, 32, 4, torch.float32)
    with pytest.raises(ModelError, match=message):
        LOW_RANK.check(linear, spec)


def test_ranks_by_head_are_for_linears_of_heads() -> None:
    for role, heads in (("up", None), ("o", 4), ("q", None)):
        linear = Linear("a", "backbone", None, role, 24, 32, heads, torch.float32)
        with pytest.raises(ModelError, match="for q, k and v projections of known heads; give it one rank"):
            LOW_RANK.check(linear, {"rank": [1, 1, 1, 1]})


# ---- head by head, from end to end ----


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
        spectrum = spectra.spectrum(one.name)
        assert spectrum.heads == heads
        if heads == 1 or one.block.endswith(".0"):
            continue
        seen.add((one.place, one.role, heads))
        W = model.get_submodule(one.name).weight.detach().double()
        metric = layer_metric(LASER, one, statistics[family])
        found = decompose(W, metric.value, metric.output, heads)
        for count in (heads, heads + 3, len(found.s) // 2, len(found.s)):
            rank = spectrum.rank(count)
            assert len(rank) == heads
            assert sum(rank) == count
            layer = LowRankLinear(one.in_features, one.out_features, rank, bias=False, dtype=torch.float64)
            layer.load_factors(*factors(W, *spectrum.directions(rank)))
            made = layer.to_dense().weight
            for head, k in enumerate(rank):
                chosen, rows = (found.head == head).nonzero()[:k, 0], W.chunk(heads)[head]
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


@pytest.mark.parametrize("multiple", [1, 3, 6])
@pytest.mark.parametrize("heads", ["multiple", "equal"])
def test_ranks_of_heads_grow_in_steps_and_their_errors_are_those_of_the_factors(heads, multiple):
    one = problem(24, 32, heads=3, storage=StoragePart(multiple=multiple, heads=heads))
    options = LOW_RANK.options(one)
    assert len(options.bytes)
    for number in range(len(options.bytes)):
        ranks = options.spec(number)["rank"]
        assert all(rank > 0 and rank % multiple == 0 for rank in ranks)
        assert heads == "multiple" or len(set(ranks)) == 1
        assert options.bytes[number] == LOW_RANK.nbytes(one.linear, options.spec(number)) < one.linear.nbytes
    for number in range(0, len(options.bytes), 3):
        layer = LOW_RANK.build(one.empty(), options.spec(number))
        layer.load_state_dict(made(one, "low-rank", options.spec(number)))
        assert lost(one, layer.product().detach()) == pytest.approx(
            options.error[number], rel=1e-3, abs=1e-6 * one.left[0]
        )


def test_blocks_of_heads_are_taken_by_what_they_gain():
    """No other ranks of as many blocks lose less."""
    one = problem(12, 32, heads=3, storage=StoragePart(multiple=2, heads="multiple"))
    spectrum, options = one.spectrum, LOW_RANK.options(one)
    costs = [spectrum.loss[spectrum.head == head] for head in range(3)]
    for number in range(len(options.bytes)):
        ranks = options.spec(number)["rank"]
        others = [r for r in product((2, 4), repeat=3) if sum(r) == sum(ranks)]
        best = min(sum(float(c[k:].sum()) for c, k in zip(costs, r, strict=True)) for r in others)
        assert options.error[number] == pytest.approx(best, abs=1e-9)


def test_free_ranks_of_heads_are_as_before():
    one, other = (problem(24, 32, heads=3, storage=StoragePart(heads=heads)) for heads in ("free", "multiple"))
    found, blocks = (LOW_RANK.options(x) for x in (one, other))
    assert found.bytes.tolist() == blocks.bytes.tolist()
    assert found.error.tolist() == pytest.approx(blocks.error.tolist(), abs=1e-9)
