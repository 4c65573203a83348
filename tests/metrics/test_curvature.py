"""Curvature: gradients against autograd, K-FAC against dense Fisher matrices, forms of metrics."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import families
from curvatures import (
    CPU,
    CurvatureStub,
    by_autograd,
    curvature,
    gather,
    input_moment,
    linear,
    matrix,
    output_moment,
    predicted,
    text,
)
from helpers.matrices import normal
from spectrim.anatomy import anatomy
from spectrim.calibrate import Moment, OutputMoment
from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.labels import Labelled
from spectrim.calibrate.moments import OutputSum
from spectrim.errors import NumericalError, RecipeError
from spectrim.maths.decompose import decompose, factors
from spectrim.maths.roots import BlockRoot, LowRankRoot, nystrom
from spectrim.maths.sums import Gram
from spectrim.metrics.curvature import predicted_loss, predicted_trace
from spectrim.metrics.metric import layer_metric


def labelled(family: str, seed: int) -> Labelled:
    """A sample whose last four tokens are its answer, with an image where the model sees; text for a language model."""
    inputs = families.example_inputs(families.FAMILIES[family](), seed=seed)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    length = inputs["input_ids"].shape[1]
    modality = "image" if "pixel_values" in inputs else "text"
    where = torch.arange(length - 1) >= (length - 5 if modality == "image" else 0)
    return Labelled(modality, inputs, where, None)


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl", "qwen3_vl"])
def test_sums_are_those_of_autograd(family):
    model = families.FAMILIES[family]().double()
    samples = [labelled(family, seed) for seed in (0, 3)]
    sums = gather(model, samples, fisher=True)
    expected = [by_autograd(model, sample) for sample in samples]
    assert sums.outputs.keys() == expected[0].keys()
    assert {"q", "k", "v"} <= {x.role for x in anatomy(model).linears if x.name in sums.outputs and x.heads}
    assert sums.labels == sum(int(sample.labelled.sum()) for sample in samples)
    for one in anatomy(model).linears:
        if one.name not in sums.outputs:
            continue
        found, pairs = sums.outputs[one.name], [sample[one.name] for sample in expected]
        close = {"rtol": 1e-6, "atol": 1e-6 * float(found.traces.max())}  # norms compute in float32
        torch.testing.assert_close(found.sums["output"], sum(g.T @ g for g, _, _ in pairs), **close)
        assert found.count == sum(len(g) for g, _, _ in pairs)
        heads = one.per_head or 1
        for head in range(heads):
            by_head = [(g.chunk(heads, 1)[head], x, weight.chunk(heads)[head]) for g, x, weight in pairs]
            token = sum(torch.outer(*rows).square().sum() for g, x, _ in by_head for rows in zip(g, x, strict=True))
            sequence = sum(weight.square().sum() for _, _, weight in by_head)
            others = [sum(part.square().sum() for part in column) for column in list(zip(*by_head, strict=True))[:2]]
            torch.testing.assert_close(found.traces[:, head], torch.stack([token, sequence, *others]), **close)
        columns = sum(
            (weight / sample.labelled.sum()).square().sum(0)
            for (_, _, weight), sample in zip(pairs, samples, strict=True)
        )
        torch.testing.assert_close(sums.fisher[one.name], columns, rtol=1e-5, atol=1e-9 * float(columns.max()))


@pytest.mark.parametrize("positions", [1, 3, 200])
@pytest.mark.parametrize("heads", [1, 2])
def test_trace_by_sequence_is_the_norm_of_the_gradient_of_the_weight(positions, heads):
    """Few positions go by the products of pairs of positions, many by the gradient of the weight."""
    g, x = normal(positions, 12), normal(positions, 10, seed=1)
    total = OutputSum.zero(CurvatureForm("diagonal"), 12, heads, CPU)
    total.add(g, x)
    gradient = torch.einsum("po,pi->oi", g, x)
    torch.testing.assert_close(total.traces[1], torch.stack([rows.square().sum() for rows in gradient.chunk(heads)]))


class Layers(nn.Module):
    """A language model of one linear or two: logits = a(embedding), or c(tanh(a(embedding)))."""

    def __init__(self, vocabulary: int, width: int, hidden: int | None, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(vocabulary, width)
        self.a = nn.Linear(width, hidden or vocabulary)
        self.c = nn.Sequential(nn.Tanh(), nn.Linear(hidden, vocabulary)) if hidden else nn.Identity()
        self.device = CPU
        self.double()

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.c(self.a(self.embedding(input_ids))))


@pytest.mark.parametrize("hidden", [None, 4])
@pytest.mark.parametrize("eta", ["none", "token", "sequence"])
def test_kfac_is_the_fisher_where_inputs_and_gradients_are_independent(hidden, eta):
    """A weight of zero makes the gradient depend on the label alone; all pairs of tokens make it independent of x."""
    size = 5
    model = Layers(size, 3, hidden, seed=2)
    nn.init.zeros_(model.a.weight)
    samples = [text(torch.tensor(pair)) for pair in itertools.product(range(size), repeat=2)]
    sums = gather(model, samples)
    expected = [by_autograd(model, sample) for sample in samples]
    for one in anatomy(model).linears:
        gradients = [sample[one.name][2].flatten() for sample in expected]
        F = sum(torch.outer(v, v) for v in gradients) / len(samples)  # one labelled token each
        found = sums.outputs[one.name]
        output = OutputMoment(found.form, found.sums, found.traces, found.count, sums.labels)
        moment = input_moment(torch.cat([sample[one.name][1] for sample in expected]))
        metric = layer_metric(curvature(eta=eta), one, CurvatureStub({"text": moment}, {"text": output}))
        for seed in range(3):
            D = normal(one.out_features, one.in_features, seed=seed)
            assert predicted(metric, D) == pytest.approx(float(D.flatten() @ F @ D.flatten()) / 2, rel=1e-6)


def test_sampled_labels_give_the_true_fisher():
    """Over the labels that the model would draw, E[g gᵀ] = diag(p) − p pᵀ at logits of chances p."""
    model = Layers(4, 6, None, seed=1)
    ids = torch.arange(4001) % 2
    with torch.no_grad():
        p = model(ids[None, :-1], None, False).logits[0].softmax(-1)
    exact = torch.diag(p.sum(0)) - p.T @ p
    errors = []
    for seed in range(3):
        sums = gather(model, [text(ids, torch.Generator().manual_seed(seed))])
        errors.append((sums.outputs["a"].sums["output"] - exact).norm() / exact.norm())
    assert max(errors) < 0.05
    given = gather(model, [text(ids)]).outputs["a"].sums["output"]
    assert (given - exact).norm() / exact.norm() > 0.3


def test_what_no_gradient_reaches_costs_nothing():
    one, D = linear(4, 3), normal(4, 3)
    X = normal(20, 3)
    for outputs in ({}, {"text": output_moment([(torch.zeros(20, 4), X.float())], 5)}):
        metric = layer_metric(curvature(eta="sequence"), one, CurvatureStub({"text": input_moment(X)}, outputs))
        assert predicted(metric, D) == 0
        spectrum = decompose(D, metric.value, metric.output)
        torch.testing.assert_close(spectrum.s, decompose(D, metric.value).s)
        assert not spectrum.loss.any()


def samples(out: int, size: int, count: int, positions: int, seed: int, scale: float = 1.0):
    """Gradients and inputs that depend on each other."""
    found = []
    for number in range(count):
        x = normal(positions, size, seed=100 * seed + number)
        g = normal(positions, out, seed=100 * seed + number + 50) * (0.3 + x[:, :1].abs()) + 0.5
        found.append((scale * g, x))
    return found


def both(labels=(30, 7), form="full", heads=1, out=8, size=5):
    """Text and image statistics of one linear, and the samples that they are of."""
    drawn = {"text": samples(out, size, 4, 9, 1), "image": samples(out, size, 3, 14, 2, scale=20.0)}
    moments = {modality: input_moment(torch.cat([x for _, x in pairs])) for modality, pairs in drawn.items()}
    outputs = {m: output_moment(pairs, n, form, heads) for (m, pairs), n in zip(drawn.items(), labels, strict=True)}
    return CurvatureStub(moments, outputs), drawn


@pytest.mark.parametrize("modality", ["text", "image"])
def test_the_prediction_of_one_modality(modality):
    """½ Σ over positions and dimensions, divided by the labels, with means of inputs: nats per labelled token."""
    statistics, drawn = both()
    g, x = (torch.cat(parts) for parts in zip(*drawn[modality], strict=True))
    found = layer_metric(curvature(modality=modality), linear(8, 5), statistics)
    D, labels = normal(8, 5), {"text": 30, "image": 7}[modality]
    expected = 0.5 * torch.einsum("po,oi,qi->pq", g, D, x).square().mean(1).sum() / labels
    assert predicted(found, D) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("eta", ["none", "token", "sequence"])
def test_eta_puts_the_trace_of_the_fisher_right(eta, heads):
    """A change of the weight that is alike in all directions costs ½ tr F; F by token or by sequence, over labels."""
    statistics, drawn = both(heads=heads)
    one = linear(8, 5, heads=heads)
    found = layer_metric(curvature(eta=eta, per_head=True), one, statistics)
    joint = layer_metric(curvature(eta=eta, per_head=True, modality="joint"), one, statistics)
    traces = {}
    for modality, labels in (("text", 30), ("image", 7)):
        trace = torch.zeros(heads, dtype=torch.float64)
        for head in range(heads):
            for g, x in drawn[modality]:
                g = g.chunk(heads, 1)[head]
                each = torch.einsum("po,pi->poi", g, x)
                if eta == "none":
                    everything = torch.cat([x for _, x in drawn[modality]])
                    trace[head] += g.square().sum() * everything.square().sum() / len(everything) / labels
                else:
                    trace[head] += (each if eta == "token" else each.sum(0)).square().sum() / labels
        traces[modality] = trace
    for metric, expected in ((found, traces["text"]), (joint, traces["text"] + traces["image"])):
        energy = torch.stack([matrix(root, 8 // heads).square().sum() for root in metric.output.roots])
        assert metric.output.nats.shape == (heads,)
        torch.testing.assert_close(metric.output.nats * energy * metric.value.trace(), expected / 2, rtol=1e-6, atol=0)


def test_eta_is_one_where_nothing_depends():
    """Inputs of one norm: by token. One position to a sample: by sequence as well."""
    g, x = normal(30, 6), functional.normalize(normal(30, 4, seed=1))
    alone = output_moment([(g[i : i + 1], x[i : i + 1]) for i in range(30)], 30)
    together = output_moment([(g, x)], 30)
    plain = predicted_trace("none", input_moment(x), alone)
    torch.testing.assert_close(predicted_trace("token", input_moment(x), together), plain)
    torch.testing.assert_close(predicted_trace("sequence", input_moment(x), alone), plain)
    assert predicted_trace("sequence", input_moment(x), together) != pytest.approx(float(plain), rel=0.01)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("beta", "gamma", "price"), [(1.0, 1.0, 1.0), (0.2, 5.0, 1.0), (1.0, 0.3, 5.0)])
def test_the_joint_prediction_adds_up_where_modalities_agree(beta, gamma, price, heads):
    """Where both modalities weigh all directions alike, the loss is text loss plus image loss times its price."""
    g, x = normal(25, 6), normal(25, 4, seed=1)
    moments = {"text": input_moment(x), "image": input_moment(7 * x.repeat(3, 1))}
    outputs = {"text": output_moment([(g, x)], 24, heads=heads)}
    outputs["image"] = output_moment([(0.01 * g.repeat(3, 1), 7 * x.repeat(3, 1))], 5, heads=heads)
    statistics, one = CurvatureStub(moments, outputs), linear(6, 4, heads=heads)
    options = {"per_head": True, "beta": beta, "gamma": gamma}
    alone, other = (layer_metric(curvature(modality=m, **options), one, statistics) for m in ("text", "image"))
    joint, dear = (
        layer_metric(curvature(modality=m, image_price=price, **options), one, statistics) for m in ("joint", "image")
    )
    D = normal(6, 4, seed=2)
    assert predicted(dear, D) == pytest.approx(price * predicted(other, D), rel=1e-6)
    assert predicted(joint, D) == pytest.approx(predicted(alone, D) + predicted(dear, D), rel=1e-6)
    assert predicted(other, D) > 0.001 * predicted(alone, D) > 0


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_the_joint_output_metric_balances_by_the_trace(beta):
    statistics, drawn = both()
    found = layer_metric(curvature(modality="joint", beta=beta), linear(8, 5), statistics)
    T, I = (torch.cat([g for g, _ in drawn[m]]) for m in ("text", "image"))  # noqa: E741
    T, I = T.T @ T / len(T), I.T @ I / len(I)  # noqa: E741
    L = matrix(found.output.roots[0], 8)
    torch.testing.assert_close(L.T @ L, T + beta * T.trace() / I.trace() * I, rtol=1e-6, atol=1e-6)


def dense_output_metric(form: str, G: torch.Tensor) -> torch.Tensor:
    """The output metric that a form stands for, from the full G [out, out]."""
    kind, _, size = form.partition(":")
    if kind == "full":
        return G
    if kind == "diagonal":
        return G.diagonal().diag()
    if kind == "blocks":
        ids = torch.arange(len(G)) // int(size)
        return torch.where(ids[:, None] == ids, G, 0.0)
    test = torch.randn(len(G), int(size), generator=torch.Generator().manual_seed(0)).double()
    V = nystrom(G @ test, test)
    return V @ V.T + (G - V @ V.T).diagonal().diag()


FORMS = ["full", "blocks:4", "sketch:3", "sketch:8", "diagonal"]


@pytest.mark.parametrize("eta", ["none", "token", "sequence"])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_one_modality_in_all_forms(form, eta):
    """``½ η tr(G D C Dᵀ) positions/labels``, with the G that the form stands for, low-rank part and all."""
    statistics, drawn = both(form=form)
    g, x = (torch.cat(parts) for parts in zip(*drawn["text"], strict=True))
    G, C, D = dense_output_metric(form, g.T @ g / len(g)), x.T @ x / len(x), normal(8, 5)
    fisher = {
        "none": G.trace() * C.trace() * len(g),
        "token": (g.square().sum(1) * x.square().sum(1)).sum(),
        "sequence": sum((g.T @ x).square().sum() for g, x in drawn["text"]),
    }[eta]
    expected = 0.5 * (G @ D @ C @ D.T).trace() / (G.trace() * C.trace()) * fisher / 30
    found = predicted_loss(eta, D, statistics.moment("a", "text"), statistics.output("a", "text"))
    assert found == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_roots_of_all_forms(form, heads):
    """Also: no form changes the diagonal of G, and damping is a share of its mean."""
    statistics, drawn = both(form=form, heads=heads)
    metric = layer_metric(curvature(per_head=True, damping=0.1), linear(8, 5, heads=heads), statistics)
    g = torch.cat([g for g, _ in drawn["text"]])
    G = g.T @ g / len(g)
    expected = dense_output_metric(form, G) + 0.1 * G.trace() / 8 * torch.eye(8)
    torch.testing.assert_close(expected.diagonal(), G.diagonal() + 0.1 * G.trace() / 8)
    size = 8 // heads
    for head, root in enumerate(metric.output.roots):
        rows, L = slice(head * size, (head + 1) * size), matrix(root, size)
        torch.testing.assert_close(L.T @ L, expected[rows, rows], rtol=1e-6, atol=1e-6)
    nats = metric.output.nats.repeat_interleave(size)
    within = torch.block_diag(*[torch.ones(size, size)] * heads)
    torch.testing.assert_close(metric.output.dense(8), nats * within * expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(8, 5), (8, 13)])
def test_dropped_directions_are_the_error_on_the_samples(form, heads, shape):
    """‖L(W − Ŵ)X‖² over the calibration samples is Σ_{i>k} s_i, and the predicted loss is Σ_{i>k} of the losses."""
    out, size = shape
    statistics, drawn = both(form=form, heads=heads, out=out, size=size)
    metric = layer_metric(curvature(per_head=True), linear(out, size, heads=heads), statistics)
    X = torch.cat([x for _, x in drawn["text"]])
    W = normal(out, size)
    found = decompose(W, metric.value, metric.output, heads)
    for k in range(heads, len(found.s) + 1):
        approximation = torch.zeros_like(W)
        for head in range(heads):
            mine = torch.arange(k) if heads == 1 else (found.head[:k] == head).nonzero()[:, 0]
            A, B = factors(W.chunk(heads)[head], found.s[mine], found.P[:, mine], found.Q[:, mine])
            approximation.chunk(heads)[head].copy_(A @ B)
        error, rows = W - approximation, zip(metric.output.roots, (W - approximation).chunk(heads), strict=True)
        measured = sum(float((root.times(part) @ X.T).square().sum()) / len(X) for root, part in rows)
        assert measured == pytest.approx(float(found.s[k:].sum()), rel=1e-6, abs=1e-9 * float(found.s.sum()))
        loss = float(found.loss[k:].sum())
        assert predicted(metric, error) == pytest.approx(loss, rel=1e-6, abs=1e-9 * float(found.loss.sum()))


def test_blocks_that_cut_heads_are_refused():
    statistics, _ = both(form="blocks:2")
    with pytest.raises(RecipeError, match="blocks of 2 outputs do not hold whole heads of 4"):
        layer_metric(curvature(per_head=True), linear(8, 5, heads=2), statistics)


def test_nan_in_output_moments_names_the_linear():
    statistics, _ = both()
    statistics.outputs["text"].traces[2, 0] = torch.nan
    with pytest.raises(NumericalError, match="output moment of a holds NaN"):
        layer_metric(curvature(), linear(8, 5), statistics)


def test_few_positions_give_the_metrics_and_losses_of_their_matrix():
    """G of 3 and 4 rows for 20 outputs, and the predicted loss, against the same from whole matrices."""
    moments, outputs, whole = {}, {}, {}
    for seed, (modality, count) in enumerate({"text": 3, "image": 4}.items()):
        g, x = normal(count, 20, seed=seed), normal(count, 12, seed=9 + seed)
        outputs[modality] = output_moment([(g, x)], count)
        whole[modality] = replace(outputs[modality], held={"output": Gram.of(outputs[modality].sums["output"])})
        kept = Gram(12, rows=x)
        moments[modality] = Moment(kept, x.abs().sum(0), count)
        assert torch.equal(outputs[modality].held["output"].rows, g)
    part, W = curvature(damping=0.1, modality="joint", beta=0.5), linear(20, 12)
    few, dense = (layer_metric(part, W, CurvatureStub(moments, found)) for found in (outputs, whole))
    assert isinstance(few.output.roots[0], LowRankRoot)
    assert isinstance(dense.output.roots[0], BlockRoot)
    torch.testing.assert_close(few.output.dense(20), dense.output.dense(20))
    L = matrix(few.output.roots[0], 20)
    torch.testing.assert_close(L.T @ L * few.output.nats, few.output.dense(20))
    D, summed = normal(20, 12, seed=5), replace(moments["image"], gram=Gram.of(moments["image"].second))
    assert predicted_loss("token", D, moments["image"], outputs["image"]) == pytest.approx(
        predicted_loss("token", D, summed, whole["image"]), rel=1e-9
    )
