"""The end-to-end pass: nearer to the dense model on samples that it did not train on, at the same bytes."""

from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from compressed import logits
from helpers.matrices import normal
from helpers.samples import processor
from helpers.streams import assert_same, prepare, weights
from spectrim.away import is_away
from spectrim.calibrate import calibrate
from spectrim.calibrate.labels import Labelled
from spectrim.checkpoint import load, read_provenance
from spectrim.errors import NumericalError, RecipeError, SampleError, UsageError
from spectrim.maths.rotation import turned
from spectrim.maths.rounding import Grid, quantize
from spectrim.pipeline import compress, compression
from spectrim.storage.packed import PackedLinear
from spectrim.tune import divergence, run
from spectrim.tune.numbers import Number
from spectrim.tune.run import _turns
from spectrim.tune.samples import Sample, divided, head_predicts, predicted, read, together
from spectrim.tune.scales import trained_scales

RANKS = {"quantize.bits": None}
AUTO = {"quantize.bits": "auto"}
TUNE = {"compensate.kind": "none", "tune.epochs": 6, "tune.rate": 0.01}


def integers(group: int | None, symmetric: bool, rotated: bool = False) -> PackedLinear:
    """A layer [12, 32] of 3 bits in float64, with a bias."""
    grid = Grid(3, group, symmetric, rotated)
    layer = PackedLinear(32, 12, grid, dtype=torch.float64)
    layer.load(quantize(normal(12, 32), grid))
    layer.bias.data = normal(12, seed=1)
    return layer


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("rotated", [False, True])
def test_gradients_of_scales_are_those_of_the_formula(group, symmetric, rotated):
    """Of any function of the output, against automatic differentiation of scale · (code − zero)."""
    layer = integers(group, symmetric, rotated)
    x = normal(2, 5, 32, seed=2).requires_grad_(True)
    codes, zeros, scale = layer.codes().double(), layer.zeros(), layer.weight_scale.clone().requires_grad_(True)
    codes = codes.view(12, scale.shape[1], -1) - (0 if zeros is None else zeros[..., None].double())
    y = (turned(x) if rotated else x) @ (codes * scale[..., None]).flatten(1).T + layer.bias
    wanted = torch.autograd.grad(y.pow(3).sum(), (x, scale))
    plain = layer(x)
    layer.weight_scale.requires_grad_(True)
    with trained_scales([layer]):
        found = layer(x)
        gradients = torch.autograd.grad(found.pow(3).sum(), (x, layer.weight_scale))
    for a, b in zip((found, *gradients), (y, *wanted), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(layer(x), plain)
    assert "forward" not in vars(layer)


def sharp(family, words, path, samples):
    """A model that is sure of its predictions, so that they can be lost, and its statistics."""
    model = families.FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    given = {"processor": processor(family), "text": words, "samples": samples, "seqlen": 16, "answer_tokens": 6}
    return model, calibrate(model, path, **given, curvature=True)


def small(model, statistics, family, changes, retain=0.3):
    """The tensors of the compressed model, and the dense model as it was before."""
    options = {"stats": statistics, "processor": processor(family), "changes": changes}
    with compression(model, "spectrim", **options) as prepared, prepared.applied(prepared.plan(retain)) as made:
        return weights(made), prepared._tuned


@pytest.mark.parametrize(("family", "changes", "retain"), [("llama", AUTO, 0.1), ("llava", RANKS, 0.3)])
def test_it_lowers_the_divergence_and_changes_floats_alone(family, changes, retain, words, tmp_path, monkeypatch):
    model, statistics = sharp(family, words, tmp_path / "s", 40 if family == "llama" else 16)
    dense = weights(model)
    before, nothing = small(model, statistics, family, changes | {"compensate.kind": "none"}, retain)
    after, tuned = small(model, statistics, family, changes | TUNE, retain)
    assert nothing is None
    assert_same(model, dense)
    assert before.keys() == after.keys()
    changed = set()
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape)
        if not torch.equal(tensor, before[name]):
            changed.add(name)
    assert changed.isdisjoint(name for name, x in after.items() if not x.is_floating_point() or "embed_tokens" in name)
    kinds = ["weight_scale"] if family == "llama" else ["A.weight", "B.weight", "bias"]
    assert all(any(name.endswith(kind) for name in changed) for kind in [*kinds, "norm.weight"])
    assert tuned.step > 0
    assert tuned.before.keys() == ({"text", "image"} if family == "llava" else {"text"})
    assert sum(tuned.after.values()) < 0.98 * sum(tuned.before.values())
    # What is found lies on disk: nothing is trained again, also for a checkpoint, whose record has the nats.
    monkeypatch.setattr(run.Tuning, "_train", None)
    again, found = small(model, statistics, family, changes | TUNE, retain)
    assert found == tuned
    assert all(torch.equal(tensor, again[name]) for name, tensor in after.items())
    given = {"stats": statistics, "processor": processor(family), "changes": changes | TUNE}
    made = compress(model, tmp_path / "small", retain=retain, **given)
    assert torch.equal(logits(load(tmp_path / "small")), logits(made))
    assert read_provenance(tmp_path / "small")["tuned"] == asdict(tuned)


def test_the_start_is_kept_where_nothing_is_better(words, tmp_path):
    model, statistics = prepare("llama", words, tmp_path / "s")
    before, _ = small(model, statistics, "llama", {"compensate.kind": "none"})
    after, tuned = small(model, statistics, "llama", TUNE | {"tune.rate": 30.0})
    assert (tuned.step, tuned.after) == (0, tuned.before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.fixture
def broken_after(monkeypatch):
    """Makes all divergences NaN after so many."""
    real, calls = divergence._between, []

    def start(most):
        def later(found, target):
            calls.append(0)
            return real(found * (torch.nan if len(calls) > most else 1), target)

        monkeypatch.setattr(divergence, "_between", later)

    return start


def test_steps_that_are_not_finite_are_taken_back(words, tmp_path, broken_after):
    model, statistics = prepare("llama", words, tmp_path / "s")
    before, _ = small(model, statistics, "llama", {"compensate.kind": "none"})
    broken_after(4)
    after, tuned = small(model, statistics, "llama", TUNE)
    assert (tuned.step, tuned.after) == (0, tuned.before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_windows_of_one_token_are_refused_before_samples_run(words, tmp_path):
    given = {"processor": processor("llama"), "text": words, "samples": 4, "seqlen": 1}
    with pytest.raises(SampleError, match=r"windows of one token \(--seqlen 1\) have none; give 2 or more"):
        compress(
            families.FAMILIES["llama"](), tmp_path / "out", recipe="jw-svd", retain=0.5, changes={"tune.epochs": 1},
            **given,
        )  # fmt: skip
    assert not list(tmp_path.glob("out*"))


def test_a_failure_leaves_the_dense_model(words, tmp_path, broken_after):
    model, statistics = prepare("llama", words, tmp_path / "s")
    dense = weights(model)
    broken_after(0)
    with pytest.raises(NumericalError, match=r"not finite; set tune\.epochs=0"):
        small(model, statistics, "llama", TUNE)
    assert_same(model, dense)
    assert all(not parameter.isnan().any() for parameter in model.parameters())
    assert not list((tmp_path / "s" / "tuned").glob("*"))


def test_a_model_that_stays_in_its_files_is_refused_before_samples_run(words, tmp_path):
    families.FAMILIES["llama"]().save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", memory="100kB")
    assert is_away(model)
    given = {"processor": processor("llama"), "text": words, "samples": 4, "seqlen": 12}
    with pytest.raises(UsageError, match=r"raise --memory, or set tune\.epochs=0"):
        compress(model, tmp_path / "out", recipe="curvature", retain=0.5, changes={"tune.epochs": 1}, **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_it_needs_samples(words, tmp_path):
    model, statistics = prepare("llama", words, tmp_path / "s", samples=4)
    wanted = r"give statistics and the model's processor, or set tune\.epochs=0"
    with (
        compression(model, "spectrim", stats=statistics, changes=TUNE) as prepared,
        pytest.raises(RecipeError, match=wanted),
    ):
        prepared.apply(prepared.plan(0.5))


@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 9))
@settings(max_examples=50)
def test_every_sample_has_its_turn_before_any_comes_again(size, count, seed):
    turns, flat = _turns(list(range(size)), count, seed), []
    while len(flat) < 3 * size:
        flat += (batch := next(turns))
        assert len(batch) == count
    assert [sorted(flat[i : i + size]) for i in (0, size, 2 * size)] == [list(range(size))] * 3


def test_samples_of_one_shape_run_together_and_none_is_lost(words, tmp_path):
    model, statistics = prepare("llava", words, tmp_path / "s")
    data = run.reload_data(model, processor("llava"), statistics, sees=True, samples=None)
    samples = [one for some in run.gathered(model, data, answer_tokens=6, seed=0).values() for one in some]
    joined = together(samples)
    assert 1 < len(joined) < len(samples)
    with torch.no_grad():
        apart = sum(predicted(model, together([one])[0].labelled).double().sum() for one in samples)
        whole = sum(predicted(model, part.labelled).double().sum() for part in joined)
    torch.testing.assert_close(apart, whole, rtol=1e-6, atol=0)


def test_the_model_beside_shares_what_is_not_trained_and_is_exchanged_apart():
    model = families.FAMILIES["qwen2"]()
    other = run.beside(model)
    assert other.lm_head.weight is other.model.embed_tokens.weight is model.model.embed_tokens.weight
    same = [a is b for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    assert same == [a.ndim > 1 for a in model.parameters()]
    model.model.norm.weight.data.mul_(2)
    model.set_submodule("model.layers.0.mlp", torch.nn.Identity())
    assert torch.equal(other.model.norm.weight, torch.ones_like(other.model.norm.weight))
    assert hasattr(other.model.layers[0].mlp, "down_proj")


def test_the_best_state_is_kept_and_not_the_last(words, tmp_path, monkeypatch):
    """Of measurements that fall and rise again; the tensors are those of that step."""
    model, statistics = prepare("llama", words, tmp_path / "s")
    nats, states = iter([4.0, 3.0, 2.0, 3.5]), []

    def measured(self, held):
        states.append(weights(self._small))
        return {"text": next(nats)}

    monkeypatch.setattr(run.Tuning, "_nats", measured)
    after, tuned = small(model, statistics, "llama", TUNE | {"tune.epochs": 3})
    assert (tuned.before, tuned.after, tuned.step, tuned.steps) == ({"text": 4.0}, {"text": 2.0}, 2, 3)
    assert all(torch.equal(tensor, after[name]) for name, tensor in states[2].items())
    assert not all(torch.equal(tensor, after[name]) for name, tensor in states[3].items())


def test_an_epoch_that_gains_nothing_is_taken_back_and_the_rate_falls(words, tmp_path, monkeypatch):
    model, statistics = prepare("llama", words, tmp_path / "s")
    nats, states = iter([4.0, 5.0, 3.0]), []

    def measured(self, held):
        states.append(weights(self._small))
        return {"text": next(nats)}

    monkeypatch.setattr(run.Tuning, "_nats", measured)
    _, tuned = small(model, statistics, "llama", TUNE | {"tune.epochs": 2})
    assert (tuned.step, tuned.steps) == (2, 2)
    start, first, second = ({name: x.double() for name, x in state.items()} for state in states)
    moved = [max(float((state[name] - start[name]).abs().max()) for name in start) for state in (first, second)]
    # The first step of Adam is as long as its rate, which is half of the third in the middle of the way.
    assert moved[1] == pytest.approx(moved[0] / 6, rel=0.01)


def test_each_quarter_of_an_epoch_is_judged_by_its_mean(words, tmp_path, monkeypatch):
    """Of nine steps, two at a time, and the last one; the first two are taken back."""
    model, statistics = prepare("llama", words, tmp_path / "s", samples=10)
    monkeypatch.setattr(run, "STEP", 16)  # tokens of a sample
    nats, judged, masters = iter([4.0, 5.0, 3.0, 2.0, 1.0, 0.5]), [], []

    class Adam(torch.optim.Adam):
        def step(self):
            super().step()
            masters.append([x.detach().clone() for x in self.param_groups[0]["params"]])

    def measured(self, held):
        judged.append((len(masters), {x.data_ptr(): x.clone() for x in self._small.parameters()}))
        return {"text": next(nats)}

    def compared(self, trained, progress):
        found, alike = train(self, trained, progress), 0
        for step, tensors in judged[1:3]:
            for n, one in enumerate(trained):
                if (tensor := tensors.get(one.tensor.data_ptr())) is not None:
                    torch.testing.assert_close(tensor, (masters[step - 2][n] + masters[step - 1][n]) / 2 * one.unit)
                    alike += 1
        assert alike == 2 * len(trained)
        return found

    train = run.Tuning._train
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(run.Tuning, "_nats", measured)
    monkeypatch.setattr(run.Tuning, "_train", compared)
    _, tuned = small(model, statistics, "llama", TUNE | {"tune.epochs": 1})
    assert [step for step, _ in judged] == [0, 2, 4, 6, 8, 9]
    assert (tuned.step, tuned.steps) == (9, 9)


@given(st.integers(1, 9), st.integers(1, 30))
def test_a_mean_is_that_of_all_values_first_and_forgets_them_later(size, count):
    one = Number.of("x", normal(3).float(), each=False)
    values = [normal(3, seed=n).float() for n in range(count)]
    for since, value in enumerate(values, 1):
        one.master.data.copy_(value)
        one.average(1 / min(since, size))
    wanted = torch.stack(values[:size]).mean(0)
    for value in values[size:]:
        wanted = wanted + (value - wanted) / size
    one.write_mean()
    torch.testing.assert_close(one.tensor, wanted * one.unit)
    one.restore(values[0])
    torch.testing.assert_close(one.mean * one.unit, values[0])


@given(st.integers(1, 100))
def test_what_is_left_out_are_the_last_samples(size):
    trained, left_out = divided({"text": list(range(size))})
    assert trained["text"] + left_out["text"] == list(range(size))
    assert len(left_out["text"]) == max(1, size // 8)


def labelled(model, count):
    """Some samples of one shape, each with other labels."""
    inputs = [families.example_inputs(model, seed=seed) for seed in range(count)]
    return [Labelled("text", x, torch.arange(x["input_ids"].shape[1] - 1) > n, None) for n, x in enumerate(inputs)]


@pytest.mark.parametrize(("family", "alone"), [("llava", True), ("qwen2", True), ("gemma2", False)])
def test_where_the_head_alone_predicts_it_need_not_run_with_the_model(family, alone):
    """Gemma 2 caps its logits behind the head: the whole model has to run again."""
    model = (families.FAMILIES | families.FURTHER)[family]().eval()
    head = model.get_output_embeddings()
    head.weight.data.mul_(30)
    one = labelled(model, 2)[1]
    with torch.no_grad():
        assert head_predicts(model, one) == alone
        if alone:
            torch.testing.assert_close(head(read(model, one)), predicted(model, one))
    runs = []
    head.register_forward_hook(lambda *_: runs.append(0))
    head.forward = plain = head.forward
    assert read(model, one).shape == (int(one.labelled.sum()), head.weight.shape[1])
    assert head.forward is plain


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_divergences_and_gradients_are_those_of_the_whole_models(family, rows, monkeypatch):
    """With a bias of the head, which is trained as well, against predictions of float64."""
    monkeypatch.setattr(divergence, "ROWS", rows)
    dense, model = ((families.FAMILIES | families.FURTHER)[family]().eval().double() for _ in range(2))
    for seed, x in enumerate(model.parameters()):
        x.data.add_(normal(*x.shape, seed=seed), alpha=0.02)
    model.lm_head.bias = torch.nn.Parameter(normal(model.lm_head.out_features))
    alone = family == "qwen2"
    samples = [Sample(one, read(dense, one).detach() if alone else None) for one in labelled(model, 3)]
    (part,) = together(samples)
    wanted = [x for x in model.parameters() if x.ndim == 1]
    logs = [predicted(m, part.labelled).log_softmax(-1) for m in (dense, model)]
    total = (logs[0].detach().exp() * (logs[0].detach() - logs[1])).sum()
    exact = torch.autograd.grad(total, wanted)
    assert divergence.divergence(dense, model, part) == pytest.approx(float(total.detach()), rel=1e-4)
    found = [torch.zeros_like(x) for x in wanted]
    for summands in divergence.gradients(dense, model, part, wanted):
        for x, summand in zip(found, summands, strict=True):
            x.add_(0 if summand is None else summand)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("each", [False, True])
def test_gradients_reach_a_master_by_the_chain_rule(each):
    tensor = torch.tensor([2.0, -0.5, 3.0])
    number = Number.of("x", tensor, each=each)
    master = number.master.detach().clone().requires_grad_()
    (master * number.unit).square().sum().backward()
    for times in (1, 2):
        number.add(2 * tensor)
        torch.testing.assert_close(number.master.grad, times * master.grad)
