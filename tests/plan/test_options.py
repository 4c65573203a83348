"""Options of linears in all forms: their bytes, what they are said to lose, budgets over all of them, and the files
that keep those that took long to find."""

import gc
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from helpers.matrices import metric, normal
from helpers.plans import RULES, THRESHOLDS, between, linear, totals
from helpers.problems import problem as drawn_problem
from helpers.samples import word_tokenizer
from spectrim.calibrate import Statistics, calibrate
from spectrim.errors import BudgetError, NumericalError, StatisticsError
from spectrim.maths.decompose import OutputMetric
from spectrim.maths.roots import BlockRoot
from spectrim.maths.rounding import error
from spectrim.pipeline import compression
from spectrim.plan.options import Menu, menu
from spectrim.plan.rules import curve
from spectrim.plan.spend import Curve, spend
from spectrim.recipe import FEED_FORWARD, AllocationPart, QuantizePart, StoragePart
from spectrim.storage import DENSE, Problem, filled, form, forms, made
from spectrim.storage.base import tensors_of

SEARCHING = [x for x in forms() if x.searches]


@pytest.fixture(scope="module")
def statistics(words, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    reader = word_tokenizer(begins=False)  # of so few tokens, four that are alike would weigh too much
    options = {"processor": reader, "text": words, "samples": 4, "seqlen": 12, "curvature": True}
    return calibrate(families.FAMILIES["llama"](), tmp_path_factory.mktemp("statistics") / "s", **options)


def stored_weight(problem: Problem, kind: str, spec) -> torch.Tensor:
    """What a linear computes with after it was made in a form, float64."""
    layer = filled(problem.empty(), kind, spec, made(problem, kind, spec)).double()
    return layer.weight.detach() if kind == DENSE else layer.product().detach()


# ---- any weights in any metrics ----


@st.composite
def problems(draw: st.DrawFn) -> list[Problem]:
    """Linears with weights and metrics, all under one recipe."""
    storage = StoragePart(pivoted=draw(st.booleans()), multiple=draw(st.sampled_from([1, 1, 3, 8])))
    quantize = QuantizePart(
        bits=draw(st.sampled_from([None, "auto", "auto", 2, 4])),
        group=draw(st.sampled_from([None, 32])),
        symmetric=draw(st.booleans()),
        method=draw(st.sampled_from(["gptq", "rtn"])),
        roles=draw(st.sampled_from(["all", "all", "feed-forward"])),
    )
    metrics, found = draw(st.sampled_from(["none", "inputs", "both"])), []
    for number in range(draw(st.integers(1, 3))):
        heads, seed = draw(st.sampled_from([1, 1, 3])), draw(st.integers(0, 2**31))
        out, size = heads * draw(st.integers(1, 48 // heads)), draw(st.sampled_from([1, 8, 32, 40, 64]))
        one = linear(number, out, size, draw(st.sampled_from([torch.bfloat16, torch.float32])), heads)
        W = normal(out, size, seed=seed).to(one.dtype) * draw(st.sampled_from([0.0, 1.0, 1.0, 3.0]))
        C = None if metrics == "none" else metric(size, seed=seed + 1)
        roots = [metric(out // heads, seed=seed + 2 + h) + 0.01 * torch.eye(out // heads) for h in range(heads)]
        output = OutputMetric(tuple(BlockRoot(M[None]) for M in roots), torch.ones(heads).double())
        given = (C, output if metrics == "both" else None)
        found.append(Problem(one, lambda W=W: W, lambda given=given: given, storage, quantize, heads=heads))
    return found


def scored(problem: Problem, offered: Menu, rule: str) -> Curve:
    wanted = None
    if rule in THRESHOLDS:
        wanted = problem.spectrum.s.sqrt()
    elif rule == "adacr":
        wanted = 0.5 + problem.linear.out_features % 3
    return curve(AllocationPart(rule=rule, floor=0.1), offered, wanted)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(RULES), st.floats(0, 1))
def test_every_rule_spends_every_budget_on_every_form(model, rule, share):
    offered = [menu(problem) for problem in model]
    for problem, one in zip(model, offered, strict=True):
        dense = problem.linear.nbytes
        for number, (size, lost) in enumerate(zip(one.bytes.tolist(), one.error.tolist(), strict=True)):
            kind, spec = one.option(number)
            assert size <= dense
            assert (size == dense) == (kind == DENSE) == (spec == {})
            tensors = tensors_of(kind, problem.linear.in_features, problem.linear.out_features, spec, problem.W.dtype)
            assert size == form(kind).nbytes(problem.linear, spec) == sum(t.nbytes for t in tensors.values())
            assert lost >= 0
            assert spec.get("rank") is None or problem.heads > 1 or spec["rank"] % problem.storage.multiple == 0
        with pytest.raises(IndexError):
            one.option(len(one.bytes))
        kinds = {one.option(number)[0] for number in range(len(one.bytes))}
        if problem.fixed_bits:
            assert "low-rank" not in kinds
            assert DENSE not in kinds or len(one.bytes) == 1
        else:
            assert DENSE in kinds
    model_curves = [scored(problem, one, rule) for problem, one in zip(model, offered, strict=True)]
    least, most = (sum(int(end(x.bytes)) for x in offered) for end in (min, max))
    budget = between((least, most), share)
    found = spend(model_curves, budget)
    left = budget - totals(model_curves, found)[0]
    assert left >= 0
    for one, now in zip(model_curves, found, strict=True):
        useful = one.cost < one.cost[now]
        assert not (useful & (one.bytes - one.bytes[now] <= left)).any()
    with pytest.raises(BudgetError, match=f"less than the {least} of the smallest options; raise --retain"):
        spend(model_curves, least - 1)
    best = spend(model_curves, most)
    assert all(one.cost[number] == one.cost.min() for one, number in zip(model_curves, best, strict=True))


def test_options_of_equal_error_cost_the_same_under_a_threshold():
    """Integers are worth the rank that loses as much."""
    problem = Problem(
        linear(0, 64, 64, torch.float32), lambda: normal(64, 64).float(), lambda: (None, None), StoragePart(),
        QuantizePart(bits="auto"),
    )  # fmt: skip
    offered = menu(problem)
    found = curve(AllocationPart(rule="global-sigma"), offered, problem.spectrum.s.sqrt())
    order = offered.error.argsort()
    assert (found.cost[order][1:] >= found.cost[order][:-1] * (1 - 1e-12)).all()
    assert found.cost[offered.error == 0].tolist() == [0.0]
    assert len(set(found.cost.tolist())) > 0.9 * len(found.cost)


# ---- what options lose ----


def test_predicted_losses_are_those_of_what_is_stored(tmp_path):
    """On samples that see every direction many times, where damping is next to nothing."""
    model = families.FAMILIES["llama"]()
    (tmp_path / "words.txt").write_text(" ".join(f"w{(7 * i * i + 3 * i * (i % 13)) % 115 + 2}" for i in range(2000)))
    options = {"processor": word_tokenizer(), "text": str(tmp_path / "words.txt"), "samples": 40, "seqlen": 24}
    many = calibrate(model, tmp_path / "s", **options, curvature=True)
    with compression(model, "curvature+gptq", stats=many, changes={"quantize.damping": 0.01}) as prepared:
        ratios: dict[str, list[float]] = {}
        for name, offered in prepared.maker.menus(prepared.parts.linears[:7]).items():
            problem = prepared.maker.problem(prepared.parts.linear(name))
            for number in range(0, len(offered.bytes), 3):
                kind, spec = offered.option(number)
                if kind in (DENSE, "low-rank"):
                    continue
                reached = error(problem.W.double() - stored_weight(problem, kind, spec), problem.C, problem.G)
                ratios.setdefault(kind, []).append(reached / float(offered.error[number]))
    assert ratios.keys() == {"integers", "integer-factors", "integers+factors"}
    for found in ratios.values():
        low, middle, high = torch.tensor(found).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        assert 0.6 < low < high < 1.3
        assert 0.85 < middle < 1.15


def test_less_loss_than_any_form_alone(statistics):
    """At every budget all forms together are predicted to lose no more than any of them, with any bits, by itself."""
    model = families.FAMILIES["llama"]()
    with compression(model, "curvature+gptq", stats=statistics) as prepared:
        linears = prepared.parts.linears
        menus = prepared.maker.menus(linears)
        kinds: dict[tuple[str, str], dict[str, list[int]]] = {}
        for name, offered in menus.items():
            for number in range(len(offered.bytes)):
                kind, spec = offered.option(number)
                bits = re.findall(r"'bits': \d", str(spec))
                kinds.setdefault((kind, str(bits)), {}).setdefault(name, []).append(number)
        assert len({kind for kind, _ in kinds}) == 5
        compared, most = 0, max(float(offered.error.max()) for offered in menus.values())
        for retain in (0.16, 0.2, 0.25, 0.4, 0.6):
            plan = prepared.plan(retain)
            budget = int(retain * plan.dense_bytes)
            for chosen in kinds.values():
                if chosen.keys() != menus.keys():
                    continue
                alone = [Curve(menus[name].bytes[x], menus[name].error[x]) for name, x in chosen.items()]
                if sum(int(one.bytes.min()) for one in alone) <= budget:
                    compared += 1
                    assert plan.loss <= totals(alone, spend(alone, budget))[1] + 1e-12 * most
        assert compared > 10
        losses = [prepared.plan(retain).loss for retain in (0.1, 0.2, 0.3, 0.5, 0.8, 1.0)]
        assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("recipe", ["curvature+gptq", "jw-svd+gptq"])
def test_errors_of_rows_are_shares_of_what_a_linear_has(recipe, statistics):
    model = families.FAMILIES["llama"]()
    with compression(model, recipe, stats=statistics) as prepared:
        plan, compared = prepared.plan(0.12), 0
        for one in prepared.parts.linears:
            row, problem = plan.linears[one.name], prepared.maker.problem(one)
            W = problem.W.double()
            left = W - stored_weight(problem, row.form, row.spec)
            whole, reached = (error(E, problem.C, problem.G) for E in (W, left))
            if row.loss is not None:
                assert row.error == pytest.approx(row.loss / whole, rel=1e-6)
            compared += 0.2 < reached / whole / row.error < 5
        assert compared > 0.7 * len(prepared.parts.linears)


def test_feedback_in_the_metric_beats_rounding_to_nearest(statistics):
    model, found = families.FAMILIES["llama"](), {}
    for method in ("gptq", "rtn"):
        changes = {"quantize.method": method, "quantize.bits": 4}
        with compression(model, "curvature+gptq", stats=statistics, changes=changes) as prepared:
            plan = prepared.plan(0.12)
            assert any(row.form == "integer-factors" for row in plan.linears.values())
            found[method] = prepared.predicted(plan)["text"]
    assert found["gptq"] < found["rtn"]


def test_integers_that_are_no_smaller_leave_the_weight_dense():
    sizes = {"hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=16, num_hidden_layers=1, head_dim=2, **sizes)).bfloat16()
    with compression(model, "svd", changes={"quantize.bits": 8}) as prepared:
        plan, menus = prepared.plan(0.9), prepared.maker.menus(prepared.parts.linears)
        for one in prepared.parts.linears:
            offered, tiny = menus[one.name], one.role in ("k", "v")  # [2, 8]: 32 bytes, or 36
            kinds = {offered.option(number)[0] for number in range(len(offered.bytes))}
            assert kinds == ({DENSE} if tiny else kinds - {DENSE})
            assert (plan.linears[one.name].form == DENSE) == tiny


def test_feed_forward_alone_may_be_integers(statistics):
    changes = {"quantize.roles": "feed-forward"}
    with compression(families.FAMILIES["llama"](), "curvature+gptq", stats=statistics, changes=changes) as prepared:
        menus = prepared.maker.menus(prepared.parts.linears)
        for one in prepared.parts.linears:
            kinds = {part.form for part in menus[one.name].parts if len(part.bytes)}
            assert (kinds - {DENSE, "low-rank"} != set()) == (one.role in FEED_FORWARD)


# ---- kept on disk ----

GPTQ = "curvature+gptq"


@pytest.fixture
def own(statistics, tmp_path) -> Statistics:
    """The same statistics in a directory of this test, without options."""
    shutil.copytree(statistics.path, tmp_path / "s", ignore=shutil.ignore_patterns("options"))
    return Statistics.open(tmp_path / "s")


def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the linears whose options are searched from now on, once for each form."""
    found: list[str] = []
    for one in SEARCHING:
        search = one.options

        def counted(problem: Problem, search=search):
            found.append(problem.linear.name)
            return search(problem)

        monkeypatch.setattr(one, "options", counted)
    return found


def options(menu: Menu) -> list[tuple]:
    """All of a menu, to the last bit."""
    return [(*menu.option(n), menu.bytes[n].tobytes(), menu.error[n].tobytes()) for n in range(len(menu.bytes))]


def test_a_second_budget_reads_the_options_of_the_first(own, monkeypatch):
    model, searched = families.FAMILIES["llama"](), searches(monkeypatch)
    with compression(model, GPTQ, stats=own) as prepared:
        names = [one.name for one in prepared.parts.linears]
        first = prepared.plan(0.3)
        assert sorted(searched) == sorted(names * len(SEARCHING))
        prepared.plan(0.2)
        assert len(searched) == len(names) * len(SEARCHING)
        before = {name: options(x) for name, x in prepared.maker.menus(prepared.parts.linears).items()}
    (home,) = (own.path / "options").iterdir()
    assert {file.name for file in home.iterdir()} == {f"{name}.safetensors" for name in names}
    searched.clear()
    for rule in ("loss-aware", "uniform", "global-sigma"):  # which compare the same options
        with compression(model, GPTQ, stats=own, changes={"allocation.rule": rule}) as prepared:
            plan = prepared.plan(0.3)
            assert (plan == first) == (rule == "loss-aware")
            after = prepared.maker.menus(prepared.parts.linears)
            assert {name: options(x) for name, x in after.items()} == before
    assert searched == []
    assert list((own.path / "options").iterdir()) == [home]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantize.bits", 4),
        ("quantize.group", 32),
        ("quantize.symmetric", False),
        ("quantize.method", "rtn"),
        ("quantize.damping", 0.2),
        ("storage.multiple", 8),
        ("metric.damping", 0.1),
    ],
)
def test_another_recipe_keeps_its_options_apart(key, value, own, monkeypatch):
    model, searched = families.FAMILIES["llama"](), searches(monkeypatch)
    for changes in ({}, {key: value}):
        with compression(model, GPTQ, stats=own, changes=changes) as prepared:
            searched.clear()
            prepared.maker.menus(prepared.parts.linears[:2])
            assert len(searched) == 2 * len(SEARCHING)
    assert len(list((own.path / "options").iterdir())) == 2


def test_floats_keep_no_options(own):
    with compression(families.FAMILIES["llama"](), "curvature", stats=own) as prepared:
        prepared.plan(0.5)
    assert not (own.path / "options").exists()


@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "linear", "recipe", "spectrum"])
def test_damaged_and_foreign_options_are_refused(damage, own):
    model = families.FAMILIES["llama"]()
    for changes in ({}, {"quantize.damping": 0.2}):
        with compression(model, GPTQ, stats=own, changes=changes) as prepared:
            menus = prepared.maker.menus(prepared.parts.linears[:2])
            home: Path = prepared.maker._home
            before = {name: options(x) for name, x in menus.items()}
            first, second = (home / f"{one.name}.safetensors" for one in prepared.parts.linears[:2])
    content = first.read_bytes()
    (other,) = (path for path in home.parent.iterdir() if path != home)
    found = {
        "byte": content[:-1] + bytes([content[-1] ^ 1]),
        "cut": content[: len(content) // 2],
        "empty": b"",
        "linear": second.read_bytes(),
        "recipe": (other / first.name).read_bytes(),
        "spectrum": (prepared.spectra.directory / first.name).read_bytes(),
    }
    first.write_bytes(found[damage])
    with (
        compression(model, GPTQ, stats=own, changes={"quantize.damping": 0.2}) as prepared,
        pytest.raises(StatisticsError, match=rf"{first.name} cannot be read \(.*\); delete it and compress") as caught,
    ):
        prepared.plan(0.3)
    assert "\n" not in str(caught.value)
    first.unlink()
    with compression(model, GPTQ, stats=own, changes={"quantize.damping": 0.2}) as prepared:
        menus = prepared.maker.menus(prepared.parts.linears[:2])
    assert {name: options(x) for name, x in menus.items()} == before
    assert first.exists()


def test_without_statistics_options_go_with_the_folder(monkeypatch):
    """Nothing stays of a recipe that reads no samples, and nothing is searched twice while it runs."""
    searched = searches(monkeypatch)
    with compression(families.FAMILIES["llama"](), "svd", changes={"quantize.bits": "auto"}) as prepared:
        prepared.plan(0.3)
        count = len(searched)
        prepared.plan(0.2)
        assert len(searched) == count > 0
        home = prepared.maker._home
        assert home.is_dir()
    assert not home.exists()


def test_a_weight_that_is_not_finite_is_named(own):
    model = families.FAMILIES["llama"]()
    with compression(model, GPTQ, stats=own) as prepared:
        one = prepared.parts.linears[1]
        model.get_submodule(one.name).weight.data[0, 0] = torch.nan
        with pytest.raises(NumericalError, match=f"{one.name}.*holds NaN"):
            prepared.maker.menus([one])


@pytest.mark.parametrize("bits", [None, "auto"])
def test_options_that_are_kept_hold_no_metrics(bits, tmp_path):
    """Those of a whole model are in memory at once."""
    given = drawn_problem(quantize=QuantizePart(bits=bits))
    held = [weakref.ref(x) for x in (given.C, given.G)]
    found = menu(given, tmp_path / "a.safetensors")
    specs = [found.option(number) for number in range(len(found.bytes))]
    del given
    gc.collect()
    assert [x() for x in held] == [None, None]
    assert [found.option(number) for number in range(len(found.bytes))] == specs
    assert {kind for kind, _ in specs} >= {"low-rank"}
