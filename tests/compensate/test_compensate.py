"""Anchored compensation: the closed form, the walk over both models, resuming, saving, refusals."""

import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from compressed import logits, low_rank
from helpers.matrices import normal
from helpers.samples import WORDS, processor
from helpers.streams import assert_same, batches, flat, prepare, record, shifted, stream, weights
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate
from spectrim.checkpoint import load, read_provenance
from spectrim.compensate import run
from spectrim.compensate.store import Store
from spectrim.disk.shelf import Shelf
from spectrim.errors import NumericalError, RecipeError, SampleError, StatisticsError
from spectrim.maths.closed_form import LeftOut, ShiftedSum, anchored_weight, best_weight, blended, correction
from spectrim.metrics.metric import joint_weights
from spectrim.pipeline import compress, compression
from spectrim.recipe import Recipe

ANCHORED = {"compensate.kind": "anchored"}


def moments(X: torch.Tensor, T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sums = ShiftedSum.zero(X.shape[1])
    for x, t in zip(X.split(7), T.split(7), strict=True):
        sums.add(x, {"a": t})
    return sums.taken(), sums.cross["a"] / sums.count


def test_the_closed_form_is_least_squares_on_the_activations():
    W, X, shift = shifted()
    stream = normal(60, 6, seed=9)  # r - r'
    for target in (X @ W.T, X @ W.T + stream):
        found = anchored_weight(W, *moments(shift, target), damping=1e-13)
        torch.testing.assert_close(found, torch.linalg.lstsq(shift, target).solution.T)
    textbook = W @ (X.T @ shift) @ torch.linalg.pinv(shift.T @ shift)
    found = anchored_weight(W, *moments(shift, X @ W.T), damping=1e-13)
    torch.testing.assert_close(found, textbook)


def test_damping_draws_towards_the_dense_weight():
    """The ridge regression of the change of the weight, as least squares with extra rows."""
    W, X, shift = shifted()
    second, cross = moments(shift, X @ W.T)
    delta = 0.3
    ridge = delta * float(second.trace()) / 10
    rows = torch.cat([shift / np.sqrt(60), np.sqrt(ridge) * torch.eye(10, dtype=torch.float64)])
    left = torch.cat([(X @ W.T - shift @ W.T) / np.sqrt(60), torch.zeros(10, 6, dtype=torch.float64)])
    expected = W + torch.linalg.lstsq(rows, left).solution.T
    torch.testing.assert_close(anchored_weight(W, second, cross, damping=delta), expected)
    far = anchored_weight(W, second, cross, damping=1e12)
    torch.testing.assert_close(far, W)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_blended_moments_serve_both_inputs(weight):
    """One regression on the rows of both, and the same error of any matrix up to a constant."""
    W, X, shift = shifted()
    target = X @ W.T + normal(60, 6, seed=9)
    H, T = blended(W, *moments(shift, target), X.T @ X / 60, weight)
    near, far = np.sqrt(weight / 60), np.sqrt((1 - weight) / 60)
    rows, wanted = torch.cat([near * shift, far * X]), torch.cat([near * target, far * X @ W.T])
    best = anchored_weight(W, H, T, damping=1e-13)
    torch.testing.assert_close(best, torch.linalg.lstsq(rows, wanted).solution.T)
    if weight == 0:
        torch.testing.assert_close(best, W)
    other = normal(6, 10, seed=4)
    error, least = ((wanted - rows @ V.T).square().sum() for V in (other, best))
    torch.testing.assert_close(error - least, ((other - best) @ H * (other - best)).sum())


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), noise=st.floats(0, 3), seed=st.integers(0, 99))
def test_a_chosen_weight_is_no_worse_on_what_was_left_out(rows, noise, seed):
    """Than none and than all of the correction; and of what is left out every position counts the same."""
    W, X, shift = shifted(seed)
    target = X @ W.T + noise * normal(60, 6, seed=seed + 9)
    D = correction(W, *moments(shift[:rows], target[:rows]), X.T @ X / 60, 0.01)
    judges = [LeftOut(W, D), LeftOut(W, D), LeftOut(W, D)]
    judges[0].add(shift[40:], target[40:])
    for part in (slice(40, 43), slice(43, 60)):
        judges[1].add(shift[part], target[part])
    weight = best_weight([(1.0, judges[0])])
    at = [float((target[40:] - shift[40:] @ (W + w * D).T).square().sum()) for w in (weight, 0, 1)]
    assert at[0] <= min(at[1:]) + 1e-9
    assert best_weight([(1.0, judges[1])]) == pytest.approx(weight)
    assert best_weight([(0.2, judges[0]), (0.6, judges[1]), (1.0, judges[2])]) == pytest.approx(weight)


def test_a_weight_of_nothing_is_none():
    W, X, shift = shifted()
    assert best_weight([(1.0, LeftOut(W, W))]) == 0
    still = LeftOut(W, 0 * W)
    still.add(shift, X @ W.T)
    assert best_weight([(1.0, still)]) == 0
    away = LeftOut(W, -W)
    away.add(shift, 2 * shift @ W.T)
    assert best_weight([(1.0, away)]) == 0
    sums = moments(shift, X @ W.T)
    torch.testing.assert_close(W + correction(W, *sums, sums[0], 1e-3), anchored_weight(W, *sums, 1e-3))


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
def test_inputs_that_did_not_shift_leave_the_weight(damping):
    W, X, _ = shifted()
    torch.testing.assert_close(anchored_weight(W, *moments(X, X @ W.T), damping=damping), W)


def test_directions_that_no_sample_shows_keep_the_dense_weight():
    W, X, shift = shifted()
    shift[:, 7:] = 0
    found = anchored_weight(W, *moments(shift, X @ W.T), damping=1e-9)
    torch.testing.assert_close(found[:, 7:], W[:, 7:])
    torch.testing.assert_close(
        found[:, :7], torch.linalg.lstsq(shift[:, :7], X @ W.T - 0).solution.T, rtol=1e-5, atol=1e-6
    )
    dead = anchored_weight(W, *moments(0 * shift, X @ W.T), damping=0.01)
    torch.testing.assert_close(dead, W)


def test_what_is_not_finite_is_named():
    sums, x = ShiftedSum.zero(3), torch.ones(4, 3)
    with pytest.raises(NumericalError, match=r"the target of layer\.q holds NaN"):
        sums.add(x, {"layer.q": x * torch.nan})
    with pytest.raises(NumericalError, match=r"the compressed input of layer\.q holds NaN"):
        sums.add(x * torch.inf, {"layer.q": x})
    second = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    second[0, 0] = 2.0
    with pytest.raises(NumericalError, match=r"raise compensate\.damping"):
        anchored_weight(torch.ones(1, 2), second, torch.ones(1, 2).double(), damping=0.01)


def chosen_share(W, fitted, left, X, damping: float) -> float:
    """The share of `auto` for (x', t) of both kinds, scaled, and dense X: by three errors on what was left out."""
    second = fitted[0].T @ fitted[0]
    H = (second + X.T @ X) / 2
    ridge = damping * H.trace() / len(H) * torch.eye(len(H), dtype=H.dtype)
    D = torch.linalg.solve(H + ridge, (fitted[1] - fitted[0] @ W.T).T @ fitted[0], left=False)
    at = [float((left[1] - left[0] @ (W + share * D).T).square().sum()) for share in (0, 0.5, 1)]
    if at[0] < 1e-15 * float(left[1].square().sum()):  # nothing is compressed before it
        return 0.0
    bend, slope = 2 * at[0] - 4 * at[1] + 2 * at[2], -3 * at[0] + 4 * at[1] - at[2]
    return min(max(-slope / (2 * bend), 0.0), 1.0)


@pytest.mark.parametrize(("residual", "share"), [(True, 0.3), (False, 1.0), (True, "auto")])
@pytest.mark.parametrize("family", ["llama", "llava"])
def test_every_linear_is_the_best_for_what_the_layers_before_it_became(family, residual, share, words, tmp_path):
    """Against least squares and a whitened SVD on activations that hooks record in the two whole models.

    What a linear reads in the finished model is what it read when it was solved: only layers before it decide.
    """
    left_out, shares_found = 12 if share == "auto" else 0, []  # the last one of twelve
    model, statistics = prepare(family, words, tmp_path / "s", torch.float64)
    parts, dense = anatomy(model), weights(model)
    before = [(modality, record(model, inputs)) for modality, inputs in batches(model, family, words)]
    damping = 0.01
    fit = {"compensate.residual": residual, "compensate.weight": share, "compensate.damping": damping}
    changes = {**ANCHORED, **fit, "metric.gamma": 0.5}
    with compression(model, "jw-svd", stats=statistics, processor=processor(family), changes=changes) as prepared:
        plan = prepared.plan(0.5)
        small = prepared.apply(plan)
    after = [record(small, inputs) for _, inputs in batches(small, family, words)]
    assert len(plan.changed) >= 10
    small.requires_grad_(False)
    for name in plan.changed:
        rank = plan.linears[name].rank
        linear, bias = parts.linear(name), dense.get(f"{name}.bias")
        rows: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        for (modality, one), two in zip(before, after, strict=True):
            if name not in one:
                continue
            target = flat(one[name][1]) - (0 if bias is None else bias)
            if residual and (r := stream(one, linear)) is not None:
                target = target + flat(r) - flat(stream(two, linear))
            rows.setdefault(modality, []).append((flat(two[name][0]), target, flat(one[name][0])))
        joined = {m: tuple(torch.cat(side) for side in zip(*pairs, strict=True)) for m, pairs in rows.items()}
        order = [joined[m] for m in ("text", "image") if m in joined]
        W = dense[f"{name}.weight"]
        cut = [(len(p[0]) - (len(p[0]) // left_out if left_out else 0)) for p in order]
        fitted = [(x[:n], t[:n]) for (x, t, _), n in zip(order, cut, strict=True)]
        left = [(x[n:], t[n:]) for (x, t, _), n in zip(order, cut, strict=True)]
        plain = [(x, x @ W.T) for _, _, x in order]

        def scaled(side, by):
            shares = joint_weights([float(x.square().sum() / len(x)) for x, _ in by], 0.5)
            scales = [np.sqrt(w / len(x)) for w, (x, _) in zip(shares, side, strict=True)]
            return [torch.cat([s * p[i] for s, p in zip(scales, side, strict=True)]) for i in (0, 1)]

        near, far, part = scaled(fitted, fitted), scaled(plain, plain), share
        if share == "auto":
            part = chosen_share(W, near, scaled(left, fitted), far[0], damping)
            shares_found.append(part)
        given = [np.sqrt(p) * torch.cat(side, dim=1) for p, side in ((part, near), (1 - part, far))]
        X, T = torch.cat(given).split([W.shape[1], W.shape[0]], dim=1)
        ridge = (damping * X.square().sum() / X.shape[1]).sqrt() * torch.eye(X.shape[1], dtype=X.dtype)
        rest = torch.cat([T - X @ W.T, torch.zeros(len(ridge), len(W), dtype=X.dtype)])
        best = W + torch.linalg.lstsq(torch.cat([X, ridge]), rest).solution.T
        U, s, Vh = torch.linalg.svd(best @ X.T, full_matrices=False)
        expected = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        found = low_rank(small)[name].to_dense().weight @ X.T
        assert (found - expected).norm() < 1e-5 * expected.norm(), name
    assert not shares_found or any(0 < part < 1 for part in shares_found)


@pytest.mark.parametrize("recipe", ["svd", "fwsvd", "asvd", "svd-llm", "jw-svd", "laser"])
def test_the_first_linears_are_those_of_the_plain_recipe(recipe, words, tmp_path):
    """Nothing has shifted before them; every recipe has the switch."""
    model = families.FAMILIES["llama"]()
    given = {"processor": processor("llama"), "text": words, "samples": 8, "seqlen": 16}
    statistics = calibrate(model, tmp_path / "s", **given, gradients=True, curvature=True)
    with compression(model, recipe, stats=statistics, processor=processor("llama")) as prepared:
        plan = prepared.plan(0.5)
        with prepared.applied(plan) as small:
            plain = {name: layer.to_dense().weight for name, layer in low_rank(small).items()}
    with compression(model, recipe, stats=statistics, processor=processor("llama"), changes=ANCHORED) as prepared:
        assert prepared.plan(0.5).linears == plan.linears
        with prepared.applied(plan) as small:
            found = {name: layer.to_dense().weight for name, layer in low_rank(small).items()}
    first = [name for name in plan.changed if name.startswith("model.layers.0.self_attn") and "o_proj" not in name]
    later = [name for name in plan.changed if "layers.1" in name]
    assert first
    assert later
    for name in first:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-3, atol=1e-4)
    assert not any(torch.allclose(found[name], plain[name], atol=1e-4) for name in later)


@pytest.mark.parametrize(("family", "recipe"), [("llama", "svd-llm"), ("llava", "jw-svd")])
def test_no_block_is_further_from_the_dense_one(family, recipe, words, calibrated):
    """On the calibration samples, of both modalities."""
    model, statistics = calibrated[family]
    before = [(modality, record(model, inputs)) for modality, inputs in batches(model, family, words)]
    errors = {}
    for kind in ("none", "anchored"):
        changes = {"compensate.kind": kind, "compensate.damping": 1e-4}
        options = {"stats": statistics, "processor": processor(family), "changes": changes}
        with compression(model, recipe, **options) as prepared, prepared.applied(prepared.plan(0.4)) as small:
            after = [record(small, inputs) for _, inputs in batches(small, family, words)]
        for (modality, one), two in zip(before, after, strict=True):
            for block in anatomy(model).blocks():
                if block in one:
                    key = (kind, modality, block)
                    errors[key] = errors.get(key, 0.0) + float((one[block][1] - two[block][1]).square().sum())
    plain = {key[1:]: error for key, error in errors.items() if key[0] == "none"}
    assert {modality for modality, _ in plain} == ({"text"} if family == "llama" else {"text", "image"})
    for key, error in plain.items():
        assert errors["anchored", *key] <= 1.05 * error, key
    last = anatomy(model).blocks("backbone")[-1]
    assert all(errors["anchored", m, b] < 0.9 * error for (m, b), error in plain.items() if b == last)


def test_both_modalities_decide(words, tmp_path):
    """Backbone factors differ when one modality is left out; the tower's are those of images whatever text there is."""
    model, statistics = prepare("llava", words, tmp_path / "s")
    found = {}
    for modality in ("text", "image", "joint"):
        changes = {**ANCHORED, "metric.modality": modality}
        with compression(model, "jw-svd", stats=statistics, processor=processor("llava"), changes=changes) as prepared:
            plan = prepared.plan(0.5) if not found else plan  # noqa: F821
            with prepared.applied(plan) as small:
                found[modality] = {name: layer.to_dense().weight for name, layer in low_rank(small).items()}
    parts = anatomy(model)
    for name, W in found["joint"].items():
        same = [torch.allclose(W, found[other][name], rtol=1e-3, atol=1e-4) for other in ("text", "image")]
        assert same == ([False, False] if parts.linear(name).place == "backbone" else [True, True]), name


def test_fewer_samples_are_the_first_ones(calibrated):
    model, statistics = calibrated["llama"]
    results = []
    for samples in (4, 12, None):
        changes = {**ANCHORED, "compensate.samples": samples}
        options = {"stats": statistics, "processor": processor("llama"), "changes": changes}
        with compression(model, "jw-svd", **options) as prepared, prepared.applied(prepared.plan(0.5)) as small:
            results.append(logits(small))
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


def test_a_killed_run_goes_on_after_the_last_unit_and_ends_with_the_same_bits(words, tmp_path, monkeypatch, caplog):
    model, statistics = prepare("llava", words, tmp_path / "s")
    before, threads = weights(model), threading.active_count()
    options = {"stats": statistics, "processor": processor("llava"), "changes": ANCHORED}
    real, written = Store.write, []

    def dies(self, unit, factors):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(unit)
        real(self, unit, factors)

    monkeypatch.setattr(Store, "write", dies)
    with compression(model, "jw-svd", **options) as prepared:
        with pytest.raises(KeyboardInterrupt):
            prepared.apply(prepared.plan(0.5))
        assert_same(model, before)
        assert threading.active_count() == threads
        assert not any("forward" in vars(module) for module in model.modules())
    files = {path: path.stat().st_mtime_ns for path in (statistics.path / "compensated").rglob("*.safetensors")}
    assert len(files) == 3
    monkeypatch.setattr(Store, "write", real)
    reports = []
    caplog.set_level("INFO", "spectrim")
    watched = compression(model, "jw-svd", **options, progress=lambda *report: reports.append(report))
    with watched as prepared, prepared.applied(prepared.plan(0.5)) as small:
        resumed = logits(small)
    steps = [report[1:] for report in reports if report[0] == "compensate"]
    assert [done for done, _ in steps] == list(range(3, steps[-1][1] + 1))  # from where it goes on
    assert f"compensate: resuming after block 3 of {steps[-1][1]}" in caplog.messages
    assert {path: path.stat().st_mtime_ns for path in files} == files
    model, other = prepare("llava", words, tmp_path / "t")
    with compression(model, "jw-svd", **{**options, "stats": other}) as prepared:
        with prepared.applied(prepared.plan(0.5)) as small:
            assert torch.equal(logits(small), resumed)
        assert threading.active_count() == threads
    next(iter(files)).write_bytes(b"x")
    with pytest.raises(StatisticsError, match="cannot be read"):
        compress(families.FAMILIES["llava"](), recipe="jw-svd", retain=0.5, **options)


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_outputs_that_would_take_too_much_are_not_held_and_nothing_else_changes(family, words, tmp_path, monkeypatch):
    model, statistics = prepare(family, words, tmp_path / "s")
    found, options = [], {"processor": processor(family), "changes": ANCHORED}
    for held in (run._HELD, 0):
        monkeypatch.setattr(run, "_HELD", held)
        kept = shutil.copytree(statistics.path, tmp_path / str(held))
        with (
            compression(model, "laser", stats=kept, **options) as prepared,
            prepared.applied(prepared.plan(0.5)) as small,
        ):
            found.append({name: value.clone() for name, value in small.state_dict().items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


@pytest.mark.parametrize(("family", "recipe"), [("llama", "svd-llm"), ("llava", "laser"), ("llama", "adasvd")])
def test_streams_that_wait_on_disk_come_back_bit_for_bit(family, recipe, words, tmp_path, monkeypatch):
    model, statistics = prepare(family, words, tmp_path / "s", torch.bfloat16)
    away: list[int] = []
    real = Shelf.write

    def write(self, storage, at=None):
        away.append(storage.nbytes())
        return real(self, storage, at)

    monkeypatch.setattr(Shelf, "write", write)
    found, moved = [], []
    changes = {"compensate.samples": 12, "compensate.buckets": None, "compensate.refine": 5}
    changes |= ANCHORED if recipe != "adasvd" else {}
    for memory in (None, "1MB"):
        kept = shutil.copytree(statistics.path, tmp_path / str(memory))
        given = {"stats": kept, "processor": processor(family), "changes": changes, "memory": memory}
        with compression(model, recipe, **given) as prepared, prepared.applied(prepared.plan(0.5)) as small:
            found.append(weights(small))
        moved.append(len(away))
        assert [path.name for path in kept.iterdir() if path.is_file()] == [
            path.name for path in statistics.path.iterdir() if path.is_file()
        ]
    assert moved[0] == 0
    passes = 2 * 3 * (1 if family == "llama" else 2)  # of 4 samples each
    assert moved[1] >= passes * 3  # what the first block reads, twice, and what the second reads
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    assert found[0].keys() == found[1].keys()


def test_what_is_done_is_not_done_again(words, tmp_path, monkeypatch):
    """Nor is it looked for again that text does not reach the tower, whose factors are the plain ones."""
    model, statistics = prepare("llava", words, tmp_path / "s")
    results = {}
    for kind in ("none", "anchored", "again"):
        if kind == "again":
            monkeypatch.setattr(run, "reload_data", None)
        changes = ANCHORED if kind != "none" else {}
        options = {"stats": statistics, "processor": processor("llava"), "changes": changes}
        with compression(model, "svd-llm", **options) as prepared, prepared.applied(prepared.plan(0.5)) as small:
            results[kind] = weights(small)
    tower = [name for name in results["none"] if "vision_tower" in name]
    assert tower
    assert all(torch.equal(results["none"][name], results["anchored"][name]) for name in tower)
    assert not all(torch.equal(W, results["anchored"][name]) for name, W in results["none"].items())
    assert all(torch.equal(W, results["again"][name]) for name, W in results["anchored"].items())


def test_a_saved_checkpoint_is_the_compensated_model(words, tmp_path):
    families.FAMILIES["llava"]().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    given = {"processor": processor("llava"), "text": words, "samples": 6, "seqlen": 16, "retain": 0.6}
    changes = ANCHORED | {"compensate.weight": 0.75}
    small = compress(load(tmp_path / "dense"), tmp_path / "small", recipe="laser", changes=changes, **given)
    again = load(tmp_path / "small")
    assert torch.equal(logits(again), logits(small))
    assert any(isinstance(layer.rank, tuple) for layer in low_rank(again).values())
    plain = compress(load(tmp_path / "dense"), recipe="laser", **given)
    assert not torch.equal(logits(plain), logits(small))
    recorded = read_provenance(tmp_path / "small")["recipe"]["compensate"]
    assert recorded == Recipe.read("laser", changes).compensate.model_dump(mode="json")
    assert recorded["kind"] == "anchored"
    assert recorded["weight"] == 0.75


def test_a_recipe_without_samples_gathers_them_for_compensation(words):
    model = families.FAMILIES["llama"]()
    with pytest.raises(RecipeError, match="needs samples; give statistics, or the model's processor"):
        compress(model, recipe="svd", retain=0.5, changes=ANCHORED)
    given = {"processor": processor("llama"), "text": words, "samples": 6, "seqlen": 16}
    assert low_rank(compress(model, recipe="svd", retain=0.5, changes=ANCHORED, **given))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "sequential"},
        {"weight": 1.5},
        {"weight": "most"},
        {"weight": True},
        {"damping": 0},
        {"samples": 0},
        {"depth": 1},
    ],
)
def test_wrong_values_are_refused(change):
    with pytest.raises(RecipeError, match=f"key 'compensate.{next(iter(change))}'"):
        Recipe.read("jw-svd", {f"compensate.{key}": value for key, value in change.items()})


def test_what_cannot_be_done_is_said(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    model, statistics = prepare("llama", str(path), tmp_path / "s")
    before, threads = weights(model), threading.active_count()
    options = {"stats": statistics, "processor": processor("llama"), "changes": ANCHORED}

    with pytest.raises(SampleError, match=r"one alone; give more, or set compensate\.weight"):
        compress(model, recipe="svd", retain=0.5, **{**options, "changes": ANCHORED | {"compensate.samples": 1}})
    one = {"text": str(path), "samples": 1, "seqlen": 8, "processor": processor("llama")}
    with pytest.raises(SampleError, match=r"the end-to-end pass .* one alone; give more, or set tune\.epochs=0"):
        compress(model, recipe="svd", retain=0.5, changes={"tune.epochs": 1}, **one)

    def refused(kind: type[Exception], message: str, **other) -> None:
        with compression(model, "svd", **{**options, **other}) as prepared, pytest.raises(kind, match=message):
            prepared.apply(prepared.plan(0.5))

    refused(RecipeError, "give statistics and the model's processor", processor=None)
    changes = ANCHORED | {"metric.modality": "image"}
    refused(RecipeError, "compensation needs image samples", changes=changes)
    path.write_text(WORDS[100:])
    refused(StatisticsError, "the samples are not those of")
    path.write_text(WORDS)
    with compression(model, "svd-llm", **options) as prepared:
        plan = prepared.plan(0.5)
        name = "model.layers.1.mlp.down_proj"
        hook = model.get_submodule(name).register_forward_hook(lambda *call: call[2] * torch.nan)
        with pytest.raises(NumericalError, match=f"the target of {name} holds NaN"):
            prepared.apply(plan)
        hook.remove()
    assert_same(model, before)
    assert threading.active_count() == threads


@pytest.mark.parametrize(("family", "recipe"), [("llama", "svd-llm"), ("llava", "laser")])
def test_refined_blocks_are_nearer_to_the_dense_ones(family, recipe, words, tmp_path):
    """Plain squared error of the last block under whitening, and the file holds what the model computes."""
    model, statistics = prepare(family, words, tmp_path / "s")
    results, errors = {}, {}
    before = [record(model, inputs) for _, inputs in batches(model, family, words)]
    last = anatomy(model).blocks("backbone")[-1]
    for steps in (0, 60):
        changes = ANCHORED | {"compensate.refine": steps}
        options = {"stats": statistics, "processor": processor(family), "changes": changes}
        with compression(model, recipe, **options) as prepared, prepared.applied(prepared.plan(0.4)) as small:
            results[steps] = weights(small)
            after = [record(small, inputs) for _, inputs in batches(small, family, words)]
        pairs = zip(before, after, strict=True)
        errors[steps] = sum(float((one[last][1] - two[last][1]).square().sum()) for one, two in pairs if last in one)
        with compression(model, recipe, **options) as prepared, prepared.applied(prepared.plan(0.4)) as again:
            assert all(torch.equal(W, results[steps][name]) for name, W in weights(again).items())
    assert errors[60] < (0.9 if recipe == "svd-llm" else 1.0) * errors[0]
    assert all(W.isfinite().all() for W in results[60].values())
