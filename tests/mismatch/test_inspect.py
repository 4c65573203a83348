"""The mismatch analysis: its identities on what a real model reads, effective ranks, and what is written."""

import builtins
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from helpers.calibrated import record_inputs, tiny
from helpers.matrices import ranked
from helpers.samples import image_folder, llava_processor, noise, word_tokenizer
from spectrim.anatomy import anatomy
from spectrim.calibrate import Moment, OutputMoment, Statistics, calibrate
from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.moments import OutputSum
from spectrim.errors import BudgetError, ReportError, StatisticsError
from spectrim.maths.decompose import decompose
from spectrim.maths.sums import Gram
from spectrim.mismatch import writing
from spectrim.mismatch.analysis import POINTS, effective_rank, inspect, mismatch
from spectrim.mismatch.writing import write


@pytest.fixture(scope="module")
def llava(words, tmp_path_factory):
    """A tiny LLaVA and its statistics."""
    folder = tmp_path_factory.mktemp("llava")
    images = image_folder(folder / "pictures", 6)
    options = {"text": words, "images": str(images), "samples": 6, "seqlen": 24}
    model = tiny("llava")
    return model, calibrate(model, folder / "stats", processor=llava_processor(), instruction="w7 w8", **options)


@pytest.fixture(scope="module")
def inspection(llava):
    return inspect(*llava)


def read_by_images(model) -> dict[str, np.ndarray]:
    """Inputs of every linear [positions, in] for the six images, by plain forward passes."""
    pixels = [llava_processor().image_processor(noise(i), return_tensors="pt")["pixel_values"] for i in range(6)]
    ids = torch.tensor([[1, *[120] * 16, 7, 8, 99]] * 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.cat(pixels)}
    return {name: calls[0] for name, calls in record_inputs(model, inputs).items()}


def test_image_loss_is_that_measured_on_images(llava, inspection):
    model, statistics = llava
    inputs = read_by_images(model)
    assert {row.name for row in inspection.linears} == {x.name for x in anatomy(model).in_place("backbone")}
    for row in inspection.linears:
        W, X = model.get_submodule(row.name).weight.detach(), torch.from_numpy(inputs[row.name])
        text = statistics.moment(row.name, "text")
        C_T = (text.second / text.count).numpy()
        alpha = np.trace(C_T) / (X.square().sum() / len(X)).item()
        # The text-only directions anew: eigenvectors of W C_T Wᵀ.
        U = torch.from_numpy(np.linalg.eigh(W.numpy() @ C_T @ W.numpy().T)[1][:, ::-1].copy())
        assert row.alpha == pytest.approx(alpha)
        compared = list(zip(row.ranks, row.image, strict=True))[: min(W.shape) // 2 : 5]
        assert len(compared) > 2
        for k, share in compared:
            lost = (W - U[:, :k] @ (U[:, :k].T @ W)) @ X.T
            assert row.image_total * share == pytest.approx(alpha * lost.square().sum().item() / len(X), rel=1e-6)


def test_rho_compares_relative_losses_at_the_rank_of_the_retention(llava, inspection):
    model, statistics = llava
    for row, linear in zip(inspection.linears, anatomy(model).in_place("backbone"), strict=True):
        assert row.rank == int(0.4 * linear.params / (linear.in_features + linear.out_features))
        moments = {m: statistics.moment(linear.name, m) for m in ("text", "image")}
        W = model.get_submodule(linear.name).weight.detach()
        found = decompose(W, moments["text"].second / moments["text"].count)
        D = W - ranked(found, W, row.rank)
        lost = {n: (D @ m.second @ D.T).trace() / (W @ m.second @ W.T).trace() for n, m in moments.items()}
        assert row.rho == pytest.approx((lost["image"] / lost["text"]).item(), rel=1e-8)
    assert {module.role for module in inspection.modules} == {row.role for row in inspection.linears} > {"q"}
    for module in inspection.modules:
        rhos = [row.rho for row in inspection.linears if row.role == module.role]
        assert (module.count, module.least, module.most) == (2, min(rhos), max(rhos))
        assert module.mean == pytest.approx(sum(rhos) / 2)
    for module in inspection.modules:
        sums = {"text": 0.0, "image": 0.0}
        for row, linear in zip(inspection.linears, anatomy(model).in_place("backbone"), strict=True):
            if row.role == module.role:
                text, image = (statistics.moment(linear.name, m) for m in ("text", "image"))
                C_T, C_I = text.second / text.count, image.second / image.count
                W = model.get_submodule(linear.name).weight.detach()
                D = W.double() - ranked(decompose(W, C_T), W, row.rank)
                sums["text"] += (D @ C_T @ D.T).trace().item()
                sums["image"] += (C_T.trace() / C_I.trace() * (D @ C_I @ D.T).trace()).item()
        assert module.raw == pytest.approx(sums["image"] / sums["text"], rel=1e-6)


def second_moment(generator, size: int, rank: int) -> torch.Tensor:
    X = torch.randn(size, rank, dtype=torch.float64, generator=generator)
    return X @ X.T


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_losses_are_those_of_the_projection_for_any_moments(shape, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(*shape, dtype=torch.float64, generator=generator)
    text, image = (second_moment(generator, shape[1], rank) for rank in ranks)
    found, spectrum = mismatch(W, text, image), decompose(W, text)
    assert bool((found.q >= 0).all())
    assert found.alpha == (pytest.approx((text.trace() / image.trace()).item()) if all(ranks) else 1.0)
    for k in range(min(shape) + 1):
        D = W - ranked(spectrum, W, k)
        for loss, C in ((found.text_loss(), text), (found.image_loss(), found.alpha * image)):
            scale = (W @ C @ W.T).trace().item()
            assert loss[k].item() == pytest.approx((D @ C @ D.T).trace().item(), abs=1e-9 * max(scale, 1))


class Same(Statistics):
    """Statistics whose images are the text again, at another scale."""

    def moment(self, linear, modality):
        text = super().moment(linear, "text")
        if text is None or modality == "text":
            return text
        return Moment(Gram.of(text.second * 7.0), text.abs_sum, text.count * 2)


def test_images_that_are_text_have_rho_one(llava):
    model, statistics = llava
    same = inspect(model, Same(statistics.path, statistics.manifest), retain=0.6)
    assert same.linears
    assert same.modules
    assert same.effective_ranks
    for row in same.linears:
        assert row.alpha == pytest.approx(2 / 7)
        assert row.rho == pytest.approx(1)
        assert row.image == pytest.approx(row.text, abs=1e-9)
        assert [x for x in row.lambdas if x is not None][:10] == pytest.approx([1.0] * 10)
    assert all(module.mean == pytest.approx(1) for module in same.modules)
    assert all(row.text == row.image for row in same.effective_ranks)


def test_effective_rank_is_that_of_the_singular_values(llava, inspection):
    model, statistics = llava
    inputs = read_by_images(model)
    assert len(inspection.effective_ranks) == len(anatomy(model).linears)
    for row in inspection.effective_ranks:
        W = model.get_submodule(row.name).weight.detach().numpy()
        energy = np.cumsum(np.linalg.svd(W @ inputs[row.name].T, compute_uv=False) ** 2)
        assert row.image == 1 + np.flatnonzero(energy >= 0.9 * energy[-1])[0]
        assert (row.text is None) == (row.joint is None) == (row.place != "backbone")
        if row.joint is not None:
            text, image = (statistics.moment(row.name, m) for m in ("text", "image"))
            C_T, C_I = ((m.second / m.count).numpy() for m in (text, image))
            joint = W @ (C_T + np.trace(C_T) / np.trace(C_I) * C_I) @ W.T
            energy = np.cumsum(np.linalg.eigvalsh(joint)[::-1])
            assert row.joint == 1 + np.flatnonzero(energy >= 0.9 * energy[-1])[0]
    for layer in inspection.layers:
        rows = [r for r in inspection.effective_ranks if (r.place, r.layer) == (layer.place, layer.layer)]
        assert layer.image == pytest.approx(np.mean([r.image / r.full for r in rows]))
        if layer.place == "backbone":
            assert layer.joint == pytest.approx(np.mean([r.joint / r.full for r in rows]))
    assert [(x.place, x.layer) for x in inspection.layers] == [(p, i) for p in ("tower", "backbone") for i in (0, 1)]


@pytest.mark.parametrize(("values", "rank"), [([0, 0], 0), ([1, 0], 1), ([1, 1, 1, 1], 4), ([8, 1.5, 0.5], 2)])
def test_effective_rank_counts_to_nine_tenths(values, rank):
    assert effective_rank(torch.tensor(values, dtype=torch.float64)) == rank


def test_written_files(inspection, tmp_path):
    paths = write(inspection, tmp_path / "new" / "out")
    names = ("effective_rank", "rho", "error_curves", "eta_by_head")
    charts = [f"{name}.{kind}" for name in names for kind in ("html", "png")]
    assert [path.name for path in paths] == ["inspection.json", *charts]
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == sorted(path.name for path in paths)
    held = json.loads(paths[0].read_text())
    assert held["linears"][3]["rho"] == pytest.approx(inspection.linears[3].rho, rel=1e-5)
    assert all(len(row["ranks"]) <= POINTS for row in held["linears"])
    assert held["data"]["fingerprint"] == inspection.data["fingerprint"]
    for path in paths[1:]:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") if path.suffix == ".png" else b'<script src="http' not in content


def test_eta_by_head_is_one_where_gradients_do_not_depend_on_inputs(words, tmp_path):
    """Of real statistics it is what the sums say, and drawn; of independent g and x it is 1."""
    model = families.FAMILIES["llama"]()
    options = {"processor": word_tokenizer(), "text": words, "samples": 3, "seqlen": 12, "curvature": True}
    statistics = calibrate(model, tmp_path / "stats", **options)
    found = inspect(model, statistics)
    heads = {row.name: len(row.token) for row in found.etas}
    assert heads == {linear.name: linear.per_head or 1 for linear in anatomy(model).linears}
    for row in found.etas:
        output = statistics.output(row.name, "text")
        token, sequence, gradients, inputs = output.traces.numpy()
        np.testing.assert_allclose(row.token, token * output.count / (gradients * inputs))
        np.testing.assert_allclose(row.sequence, sequence * output.count / (gradients * inputs))
    assert "eta_by_head.png" in [path.name for path in write(found, tmp_path / "out")]
    g, x = torch.randn(40_000, 6, generator=torch.Generator().manual_seed(0)), torch.ones(40_000, 3)
    g, x = g[:20_000].repeat(2, 1), torch.cat([x[:20_000], 2 * x[:20_000]])  # every g with both x
    sums = OutputSum.zero(CurvatureForm.read("full"), 6, 2, torch.device("cpu"))
    sums.add(g, x)
    token, _ = OutputMoment(sums.form, sums.sums, sums.traces, sums.count, 1).eta()
    assert token.tolist() == pytest.approx([1.0, 1.0], rel=1e-4)


def test_a_language_model_has_effective_ranks_only(words, tmp_path):
    model = families.FAMILIES["llama"]()
    options = {"processor": word_tokenizer(), "text": words, "samples": 3, "seqlen": 12}
    found = inspect(model, calibrate(model, tmp_path / "stats", **options))
    assert found.linears == found.modules == ()
    assert "no image moments" in found.notes[0]
    assert len(found.effective_ranks) > 10
    assert all(row.text > 0 and row.image is None for row in found.effective_ranks)
    names = [f"{name}.{kind}" for name in ("effective_rank", "eta_by_head") for kind in ("html", "png")]
    assert [path.name for path in write(found, tmp_path / "out")[1:]] == names
    plain = replace(found, etas=())
    assert [path.name for path in write(plain, tmp_path / "plain")[1:]] == ["effective_rank.html", "effective_rank.png"]


def test_text_that_loses_nothing_has_no_rho(llava):
    model, statistics = llava

    class Silent(Statistics):
        def moment(self, linear, modality):
            moment = super().moment(linear, modality)
            return None if moment is None else replace(moment, gram=Gram.of(moment.second * (modality == "image")))

    found = inspect(model, Silent(statistics.path, statistics.manifest))
    assert {row.rho for row in found.linears} == {None}
    assert found.modules == ()
    assert "undefined for 14 linears" in found.notes[0]
    json.loads(found.to_json())


def test_refusals(llava, inspection, tmp_path, monkeypatch):
    model, statistics = llava
    with pytest.raises(BudgetError, match=r"retention of 1\.5 is impossible"):
        inspect(model, statistics, retain=1.5)
    data = statistics.manifest.data.model_copy(update={"text": None})
    images = Statistics(statistics.path, statistics.manifest.model_copy(update={"data": data}))
    with pytest.raises(StatisticsError, match=r"no text moments.*calibrate with a text source"):
        inspect(model, images)
    with pytest.raises(StatisticsError, match="another model"):
        inspect(tiny("llama"), statistics)
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        write(inspection, tmp_path / "file", plots=False)
    monkeypatch.setattr(writing, "find_spec", lambda name: None if name == "vl_convert" else builtins)
    with pytest.raises(ReportError, match=r'plots need vl_convert; run pip install "spectrim\[report\]"'):
        write(inspection, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in write(inspection, tmp_path / "out", plots=False)] == ["inspection.json"]
