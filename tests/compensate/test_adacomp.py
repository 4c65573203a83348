"""adaComp: alternating least squares against activations and textbook forms, buckets, the walk, the recipe adasvd."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from compressed import logits, low_rank
from helpers.matrices import normal
from helpers.samples import WORDS, processor
from helpers.streams import batches, flat, prepare, record, shifted, stream, weights
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate
from spectrim.calibrate.positions import Positions
from spectrim.checkpoint import load, read_provenance
from spectrim.compensate import run
from spectrim.errors import RecipeError, SampleError, StatisticsError
from spectrim.maths.alternating import alternate, pseudo_inverse
from spectrim.maths.decompose import decompose, factors
from spectrim.maths.roots import BlockRoot
from spectrim.metrics.metric import joint_weights
from spectrim.pipeline import compress, compression
from spectrim.recipe import Recipe

ADACOMP = {"compensate.kind": "adacomp", "compensate.weight": 1.0}


def moments(X: torch.Tensor, T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return X.T @ X / len(X), T.T @ X / len(X)


def error(A: torch.Tensor, B: torch.Tensor, X: torch.Tensor, T: torch.Tensor) -> float:
    return float((T - X @ B.T @ A.T).square().sum() / len(X))


def start(W: torch.Tensor, C: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the plain recipe."""
    found = decompose(W, C)
    return factors(W, found.s[:rank], found.P[:, :rank], None if found.Q is None else found.Q[:, :rank])


@st.composite
def problems(draw: st.DrawFn):
    """W, inputs of the dense and of the compressed model, rank; some channels are silent, twins, or of another size."""
    out, size, rows = draw(st.integers(2, 8)), draw(st.integers(2, 8)), draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**31))
    W, X = normal(out, size, seed=seed), normal(rows, size, seed=seed + 1)
    X *= 10.0 ** draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size).map(torch.tensor))
    shift = X + draw(st.sampled_from([0.0, 0.3, 3.0])) * X.roll(1, 1)
    for channel in draw(st.sets(st.integers(0, size - 1), max_size=size - 1)):
        shift[:, channel] = draw(st.sampled_from([0.0, 1.0])) * shift[:, (channel + 1) % size]
    return W, X, shift, draw(st.integers(1, min(out, size)))


@settings(max_examples=100, deadline=None)
@given(problems())
def test_the_projection_is_already_the_best_under_one_metric(problem):
    """No round improves it, nor does any number of rounds from elsewhere get below it."""
    W, X, _, rank = problem
    T = X @ W.T
    second, cross = moments(X, T)
    A, B = start(W, second, rank)
    energy, best = float(T.square().sum() / len(X)), error(A, B, X, T)
    for rounds in (1, 5):
        assert error(*alternate(A, B, second, cross, rounds=rounds), X, T) >= best - 1e-9 * energy
    other = alternate(normal(len(W), rank, seed=1), normal(rank, W.shape[1], seed=2), second, cross, rounds=5)
    assert error(*other, X, T) >= best - 1e-9 * energy


def test_nor_does_it_move_under_one_metric():
    W, X, _ = shifted()
    second, cross = moments(X, X @ W.T)
    A, B = start(W, second, 3)
    after = alternate(A, B, second, cross, rounds=3)
    torch.testing.assert_close(after[0] @ after[1], A @ B)


def test_from_other_samples_it_reaches_the_projection():
    W, X, _ = shifted()
    A, B = start(W, torch.eye(10, dtype=torch.float64), 3)
    second, cross = moments(X, X @ W.T)
    best = start(W, second, 3)
    found = alternate(A, B, second, cross, rounds=2000)
    torch.testing.assert_close(found[0] @ found[1], best[0] @ best[1], rtol=1e-5, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(problems(), st.booleans(), st.booleans())
def test_the_error_falls_in_every_round(problem, stranger, weighed):
    """From the plain factors and from any others, whatever the inputs lack, under either output metric."""
    W, X, shift, rank = problem
    T = X @ W.T + (0.5 * normal(len(X), len(W), seed=5) if stranger else 0)
    L = torch.eye(len(W), dtype=torch.float64) + (normal(len(W), len(W), seed=6) if weighed else 0)
    root = BlockRoot((L.T @ L)[None]) if weighed else None
    second, cross = moments(shift, T)
    A, B = start(W, X.T @ X, rank) if not stranger else (normal(len(W), rank), normal(rank, W.shape[1], seed=3))
    errors = [error(L @ A, B, shift, T @ L.T)]
    for rounds in range(1, 5):
        after = alternate(A, B, second, cross, rounds=rounds, output=root)
        errors.append(error(L @ after[0], after[1], shift, T @ L.T))
    # Moments have half of the digits of inputs: what lies at their limit may come and go.
    slack = 1e-7 * (errors[0] + float(T.square().sum() / len(T)))
    assert all(later <= before + slack for before, later in pairwise(errors))


def activation_form(A, B, X, T, rounds, L=None):
    """AdaSVD as its text has it: pseudo-inverses of the activations themselves."""
    L = torch.eye(len(A), dtype=A.dtype) if L is None else L
    for _ in range(rounds):
        A = torch.linalg.lstsq(X @ B.T, T, driver="gelsd").solution.T
        B = torch.linalg.pinv(L @ A) @ L @ T.T @ torch.linalg.pinv(X.T)
    return A, B


@pytest.mark.parametrize("rounds", [1, 2, 15])
@pytest.mark.parametrize("weighed", [False, True])
def test_moments_give_what_activations_give(rounds, weighed):
    W, X, shift = shifted()
    T = X @ W.T + normal(60, 6, seed=9)
    L = torch.eye(6, dtype=torch.float64) + (0.4 * normal(6, 6, seed=8) if weighed else 0)
    A, B = start(W, X.T @ X, 3)
    found = alternate(A, B, *moments(shift, T), rounds=rounds, output=BlockRoot((L.T @ L)[None]) if weighed else None)
    for one, other in zip(found, activation_form(A, B, shift, T, rounds, L), strict=True):
        torch.testing.assert_close(one, other)


def test_the_textbook_form_on_moments():
    """A = W C Bᵀ (B C Bᵀ)⁺ and B = A⁺ W for dense inputs; A = T Bᵀ (B C' Bᵀ)⁺ and B = A⁺ T C'⁺ for shifted ones."""
    W, X, shift = shifted()
    A, B = start(W, torch.eye(10, dtype=torch.float64), 3)
    for inputs in (X, shift):
        C, T = moments(inputs, X @ W.T)
        expected_A = T @ B.T @ torch.linalg.pinv(B @ C @ B.T)
        expected_B = torch.linalg.pinv(expected_A) @ (W if inputs is X else T @ torch.linalg.pinv(C))
        found = alternate(A, B, C, T, rounds=1)
        torch.testing.assert_close(found[0], expected_A)
        torch.testing.assert_close(found[1], expected_B)


def test_what_no_sample_shows_stays():
    W, X, shift = shifted()
    A, B = start(W, torch.eye(10, dtype=torch.float64), 3)
    shift[:, 7:] = 0
    found = alternate(A, B, *moments(shift, X @ W.T), rounds=2)
    torch.testing.assert_close(found[1][:, 7:], B[:, 7:])
    seen = alternate(A, B[:, :7], *moments(shift[:, :7], X @ W.T), rounds=2)
    torch.testing.assert_close(found[0], seen[0])
    torch.testing.assert_close(found[1][:, :7], seen[1])
    for one, other in zip(alternate(A, B, *moments(0 * shift, X @ W.T), rounds=2), (A, B), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_it_fits_one_factor_to_a_rounded_other():
    """The least-squares A for a B in steps of a tenth of its largest entry."""
    W, X, _ = shifted()
    T = X @ W.T
    second, cross = moments(X, T)
    A, B = start(W, second, 3)
    rounded = (B / B.abs().max() * 10).round() * B.abs().max() / 10
    found = alternate(A, rounded, second, cross, rounds=1)[0]
    torch.testing.assert_close(found, torch.linalg.lstsq(X @ rounded.T, T).solution.T)
    assert error(A, B, X, T) < error(found, rounded, X, T) < error(A, rounded, X, T)


def test_a_pseudo_inverse_keeps_channels_of_very_different_size():
    """Sums of float32 products hold each channel to its own precision."""
    X = normal(60, 6) * 10.0 ** torch.linspace(0, -6, 6, dtype=torch.float64)
    M = (X.float().T @ X.float()).double()
    d = M.diagonal().sqrt()
    unit = M / d / d[:, None]
    torch.testing.assert_close(
        pseudo_inverse(M, torch.float32) * d * d[:, None], torch.linalg.inv(unit), rtol=1e-6, atol=1e-6
    )
    M[2], M[:, 2] = 0, 0  # a channel that was never on
    P = pseudo_inverse(M, torch.float32)
    assert not P[2].any()
    torch.testing.assert_close(P @ M @ P, P, rtol=1e-6, atol=1e-6 * float(P.abs().max()))


def test_averages_are_taken_position_by_position():
    x = normal(3, 5, 4)
    every = Positions((3, 5), None, None, 0)
    torch.testing.assert_close(every.average("backbone", x), x.mean(0))
    torch.testing.assert_close(every.average("backbone", x.reshape(15, 4)), x.mean(0))
    torch.testing.assert_close(every.average("tower", normal(12, 7)), normal(12, 7).view(3, 4, 7).mean(0))
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    picked = torch.stack([row[keep] for row, keep in zip(x, mask, strict=True)])
    torch.testing.assert_close(Positions((3, 5), mask.flatten(), None, 0).average("backbone", x), picked.mean(0))
    mask[0, 0] = True
    uneven = Positions((3, 5), mask.flatten(), None, 0)
    for counted, place, other in (
        (uneven, "backbone", x),
        (every, "tower", normal(7, 4)),
        (every, "backbone", x[:, 0]),
    ):
        with pytest.raises(SampleError, match=r"cannot be averaged; set compensate\.buckets=null"):
            counted.average(place, other)


def bucketed(x: torch.Tensor, buckets: int | None) -> torch.Tensor:
    """[samples, positions, width] → rows, or the means of ⌈samples / buckets⌉ neighbours."""
    x = x.reshape(len(x), -1, x.shape[-1])
    return flat(x) if buckets is None else torch.cat([part.mean(0) for part in x.split(-(-len(x) // buckets))])


@torch.no_grad()
def strong(family: str):
    """In float64, with weights so large that no layer is nearly linear, which would leave inputs nearly dependent."""
    model = families.FAMILIES[family]().double()
    for linear in anatomy(model).linears:
        model.get_submodule(linear.name).weight.mul_(10)
    return model


@pytest.mark.parametrize(("family", "buckets", "rounds"), [("llama", None, 2), ("llava", None, 1), ("llava", 5, 2)])
def test_every_linear_is_fitted_to_what_the_layers_before_it_became(family, buckets, rounds, words, tmp_path):
    """Against pseudo-inverses of activations that hooks record in the two whole models, and better than before."""
    model = strong(family)
    given = {"processor": processor(family), "text": words, "samples": 12, "seqlen": 16, "batch_size": 4}
    statistics = calibrate(model, tmp_path / "s", **given)
    parts, dense = anatomy(model), weights(model)
    before = [(modality, record(model, inputs)) for modality, inputs in batches(model, family, words)]
    changes = {**ADACOMP, "compensate.rounds": rounds, "compensate.buckets": buckets}
    given = {"stats": statistics, "processor": processor(family)}
    with compression(model, "jw-svd", **given) as prepared:
        plan = prepared.plan(0.5)
        with prepared.applied(plan) as small:
            plain = {name: (layer.A.weight, layer.B.weight) for name, layer in low_rank(small).items()}
    with compression(model, "jw-svd", **given, changes=changes) as prepared:
        small = prepared.apply(plan)
    after = [record(small, inputs) for _, inputs in batches(small, family, words)]
    small.requires_grad_(False)
    places = []  # of linears whose inputs have no direction between signal and rounding
    for name, layer in low_rank(small).items():
        linear, bias = parts.linear(name), dense.get(f"{name}.bias")
        rows: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for (modality, one), two in zip(before, after, strict=True):
            if name not in one:
                continue
            target = one[name][1] - (0 if bias is None else bias)
            if (r := stream(one, linear)) is not None:
                target = target + r - stream(two, linear)
            rows.setdefault(modality, []).append((two[name][0], target))
        order = [
            tuple(bucketed(torch.cat(side), buckets) for side in zip(*rows[m], strict=True))
            for m in ("text", "image")
            if m in rows
        ]
        shares = joint_weights([float(X.square().sum() / len(X)) for X, _ in order], 1.0)
        X, T = (torch.cat([np.sqrt(w / len(p[0])) * p[i] for w, p in zip(shares, order, strict=True)]) for i in (0, 1))
        A, B = activation_form(*plain[name], X, T, rounds)
        expected, found = X @ B.T @ A.T, X @ layer.to_dense().weight.T
        values = torch.linalg.svdvals(X / X.norm(dim=0).clamp_min(1e-30))
        if not ((values > 1e-12 * values[0]) & (values < 1e-5 * values[0])).any():
            assert (found - expected).norm() < 1e-3 * expected.norm(), name
            places.append(linear.place)
        assert (found - T).norm() <= (X @ plain[name][1].T @ plain[name][0].T - T).norm(), name
    assert places.count("backbone") > 5
    assert family == "llama" or places.count("tower") > 3


def test_as_many_buckets_as_samples_are_none_at_all(words, tmp_path):
    model, statistics = prepare("llama", words, tmp_path / "s", torch.float64)
    found = {}
    for buckets in (None, 12, 3):
        changes = {**ADACOMP, "compensate.buckets": buckets}
        options = {"stats": statistics, "processor": processor("llama"), "changes": changes}
        with compression(model, "svd-llm", **options) as prepared, prepared.applied(prepared.plan(0.5)) as small:
            found[buckets] = logits(small)
    torch.testing.assert_close(found[12], found[None], rtol=1e-5, atol=1e-5)
    assert (found[3] - found[None]).norm() > 10 * (found[12] - found[None]).norm()


def test_more_rounds_bring_the_last_block_nearer(words, tmp_path):
    """On the calibration samples; q, k and v by head as well."""
    model, statistics = prepare("llama", words, tmp_path / "s")
    before = [record(model, inputs) for _, inputs in batches(model, "llama", words)]
    last = anatomy(model).blocks()[-1]
    for recipe in ("svd", "laser"):
        errors = []
        for changes in ({}, ADACOMP, {**ADACOMP, "compensate.rounds": 5}):
            options = {"stats": statistics, "processor": processor("llama"), "changes": changes}
            with compression(model, recipe, **options) as prepared, prepared.applied(prepared.plan(0.4)) as small:
                after = [record(small, inputs) for _, inputs in batches(small, "llama", words)]
            pairs = zip(before, after, strict=True)
            errors.append(sum(float((one[last][1] - two[last][1]).square().sum()) for one, two in pairs))
        assert errors[2] < errors[1] < errors[0], recipe


def test_the_recipe_adasvd_end_to_end(words, tmp_path):
    families.FAMILIES["llava"]().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    given = {"processor": processor("llava"), "text": words, "samples": 6, "seqlen": 16, "retain": 0.6}
    small = compress(load(tmp_path / "dense"), tmp_path / "small", recipe="adasvd", **given)
    again = load(tmp_path / "small")
    assert low_rank(again)
    assert torch.equal(logits(again), logits(small))
    record = read_provenance(tmp_path / "small")
    assert record["recipe"]["compensate"]["kind"] == "adacomp"
    assert record["recipe"]["allocation"]["rule"] == "adacr"
    assert 0.59 < record["retention"]["bytes"] <= 0.6
    plain = {"compensate.kind": "none", "allocation.rule": "uniform"}
    ablated = compress(load(tmp_path / "dense"), recipe="adasvd", changes=plain, **given)
    other = compress(
        load(tmp_path / "dense"), recipe="jw-svd", changes={"allocation.rule": "uniform"}, **given
    )  # the same metric
    assert torch.equal(logits(ablated), logits(other))
    assert not torch.equal(logits(ablated), logits(small))


def test_what_is_done_is_not_done_again_unless_rounds_or_buckets_change(words, tmp_path, monkeypatch):
    model, statistics = prepare("llama", words, tmp_path / "s")
    options = {"stats": statistics, "processor": processor("llama")}

    def compressed(**changes):
        with compression(model, "svd-llm", **options, changes=ADACOMP | changes) as prepared:
            plan = prepared.plan(0.5)
            with prepared.applied(plan) as small:
                return logits(small)

    first = compressed()
    monkeypatch.setattr(run, "reload_data", None)
    assert torch.equal(compressed(), first)
    for changes in ({"compensate.rounds": 2}, {"compensate.buckets": 4}):
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):  # it asks for its samples
            compressed(**changes)


def test_wrong_values_and_other_samples_are_refused(tmp_path):
    for key in ("rounds", "buckets"):
        with pytest.raises(RecipeError, match=f"compensate.{key}"):
            Recipe.read("adasvd", {f"compensate.{key}": 0})
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    model, statistics = prepare("llama", str(path), tmp_path / "s")
    path.write_text(WORDS[100:])
    with compression(model, "adasvd", stats=statistics, processor=processor("llama")) as prepared:
        with pytest.raises(StatisticsError, match="the samples are not those of"):
            prepared.plan(0.5)
        path.write_text(WORDS)
        assert prepared.plan(0.5).changed
