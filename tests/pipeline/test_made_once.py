"""Nothing expensive is done twice: a linear is made once for each checkpoint, and decomposed once in each metric."""

import json
import shutil
from collections import Counter

import pytest
import torch

import families
from compressed import logits
from helpers.command import run
from helpers.samples import processor
from spectrim.calibrate import calibrate
from spectrim.checkpoint import load
from spectrim.errors import StatisticsError
from spectrim.maths.decompose import decompose
from spectrim.metrics import spectra
from spectrim.pipeline import compress, compression, probe
from spectrim.plan.plan import Plan
from spectrim.recipe import builtin_names
from spectrim.storage import form, forms, integers_and_factors, problem


@pytest.fixture(scope="module")
def calibrated(words, tmp_path_factory):
    """A model, and statistics that all recipes can be made of."""
    model = families.FAMILIES["llama"]()
    given = {"processor": processor("llama"), "text": words, "samples": 4, "seqlen": 16}
    path = tmp_path_factory.mktemp("made") / "s"
    return model, calibrate(model, path, **given, gradients=True, curvature=True)


@pytest.fixture
def made(monkeypatch) -> Counter[str]:
    """How often each linear is made, by name, in whatever form and by whatever fit."""
    counts: Counter[str] = Counter()

    def counting(real):
        def count(problem, *arguments):
            counts[problem.linear.name] += 1
            return real(problem, *arguments)

        return count

    for known in forms():
        monkeypatch.setattr(known, "make", counting(known.make))
        monkeypatch.setattr(known, "alternate", counting(known.alternate))
    return counts


@pytest.fixture
def decomposed(monkeypatch) -> Counter[tuple[bytes, ...]]:
    """How often the same weight is decomposed in the same metrics."""
    counts: Counter[tuple[bytes, ...]] = Counter()

    def count(W, metric=None, output=None, heads=1):
        G = None if output is None else output.dense(len(W))
        inputs = [b"" if x is None else x.detach().double().numpy().tobytes() for x in (W, metric, G)]
        counts[(*inputs, str(heads).encode())] += 1
        return decompose(W, metric, output, heads)

    for module in (spectra, problem, integers_and_factors):
        monkeypatch.setattr(module, "decompose", count)
    return counts


def forget(statistics) -> None:
    """Take away what an earlier compression left."""
    for name in ("spectra", "options", "compensated"):
        shutil.rmtree(statistics.path / name, ignore_errors=True)


def forget_made(statistics) -> None:
    """Take away the tensors of linears, and leave what was decomposed and which options there are."""
    shutil.rmtree(statistics.path / "compensated", ignore_errors=True)
    for folder in (statistics.path / "options").glob("*/*/"):
        shutil.rmtree(folder)


def kept_rows(plan) -> set[tuple[str, str, str]]:
    """Name, form and spec of the linears whose stored tensors are kept for other budgets."""
    rows = ((name, plan.linears[name]) for name in plan.changed)
    return {(name, row.form, json.dumps(row.spec)) for name, row in rows if form(row.form).searches}


@pytest.mark.parametrize("bits", [None, "auto"])
@pytest.mark.parametrize("recipe", builtin_names())
def test_every_recipe_makes_and_decomposes_once(recipe, bits, calibrated, made, decomposed):
    """Directions of the weight itself serve all budgets; those of anchored weights, and beside integers, are new."""
    model, statistics = calibrated
    forget(statistics)
    given = {"stats": statistics, "processor": processor("llama")}
    known = 0
    for kind in ("none", "anchored", *(["adacomp"] if (recipe, bits) == ("adasvd", None) else [])):
        made.clear()
        changes = {"quantize.bits": bits, "compensate.kind": kind}
        changes |= {"compensate.weight": 0.3} if kind == "anchored" else {}  # which anchors every weight
        with compression(model, recipe, **given, changes=changes) as prepared:
            known = known or len(prepared.parts.linears)  # what one kind decomposed serves the next
            assert decomposed.total() == known
            plan = prepared.plan(0.4)
            assert not made
            with prepared.applied(plan):
                assert made == dict.fromkeys(plan.changed, 1)
        again = [row for row in plan.linears.values() if row.form == "integers+factors"]
        if kind == "anchored":
            again = [row for row in plan.linears.values() if row.rank is not None]
        known += len(again)
        assert decomposed.total() == known
        assert set(decomposed.values()) == {1}


@pytest.mark.parametrize("kind", ["none", "anchored"])
@pytest.mark.parametrize("bits", [None, "auto"])
def test_a_checkpoint_is_written_from_what_was_made_once(bits, kind, calibrated, made, tmp_path):
    """By `compress` with a directory or without, by `Compression.save`; kept integers are not made again."""
    model, statistics = calibrated
    changes = {"quantize.bits": bits, "compensate.kind": kind}
    given = {"stats": statistics, "processor": processor("llama"), "changes": changes}
    forget(statistics)
    with compression(model, "curvature", **given) as prepared:
        before = set()
        for retain in (0.6, 0.4):
            made.clear()
            plan = prepared.plan(retain)
            prepared.save(plan, tmp_path / f"{retain}")
            kept = kept_rows(plan) if kind == "none" else set()
            again = {name for name, _, _ in kept & before}
            assert made == dict.fromkeys(set(plan.changed) - again, 1)
            before |= kept
    for out in (None, tmp_path / "out"):
        forget_made(statistics)
        made.clear()
        small = compress(families.FAMILIES["llama"](), out, recipe="curvature", retain=0.4, **given)
        assert made == dict.fromkeys(plan.changed, 1)
        assert torch.equal(logits(small), logits(load(tmp_path / "0.4")))
    made.clear()
    compress(families.FAMILIES["llama"](), recipe="curvature", plan=tmp_path / "out" / "plan.json", **given)
    kept = {name for name, _, _ in kept_rows(plan)} if kind == "none" else set(plan.changed)
    assert made == dict.fromkeys(set(plan.changed) - kept, 1)


def test_kept_integers_are_those_that_were_made_and_damaged_ones_are_refused(calibrated, tmp_path):
    model, statistics = calibrated
    given = {"stats": statistics, "processor": processor("llama"), "changes": {"quantize.bits": 4}}
    forget(statistics)
    with compression(model, "curvature", **given) as prepared:
        plan = prepared.plan(0.4)
        name = next(name for name, _, _ in sorted(kept_rows(plan)))
        linear, row = prepared.parts.linear(name), plan.linears[name]
        fresh, kept = (prepared.maker.make(linear, row) for _ in range(2))
        assert kept.keys() == fresh.keys()
        assert all(torch.equal(kept[key], fresh[key]) for key in fresh)
        (path,) = (statistics.path / "options").glob(f"*/{name}/*.safetensors")
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(StatisticsError, match="cannot be read"):
            prepared.maker.make(linear, row)
        path.unlink()
        assert torch.equal(prepared.maker.make(linear, row)[next(iter(fresh))], fresh[next(iter(fresh))])


@pytest.mark.parametrize("kind", ["none", "anchored"])
def test_the_command_line_makes_once_for_each_budget(kind, made, decomposed, capsys, words, tmp_path, monkeypatch):
    """Also where it gathers samples itself; what it prints of them comes from the record. The estimate, which makes
    some linears to see how long that takes, is left out.
    """
    monkeypatch.setattr(probe, "_try", lambda *_: probe.Rates(0.0, 0.0, 0.0))
    families.FAMILIES["llava"]().save_pretrained(tmp_path / "dense")
    processor("llava").save_pretrained(tmp_path / "dense")
    out, samples = tmp_path / "out", ["--text", words, "--samples", "4", "--seqlen", "16"]
    budgets = ["--retain", "0.7", "--retain", "0.5", "--recipe", "spectrim", "--set", f"compensate.kind={kind}"]
    budgets += ["--set", "compensate.weight=0.3"] if kind == "anchored" else []  # which anchors every weight
    code, said, err = run(capsys, "compress", tmp_path / "dense", "-o", out, *budgets, *samples)
    assert code == 0, err
    plans = [Plan.read(out / f"retain-{retain}" / "plan.json") for retain in (0.7, 0.5)]
    assert made == Counter(name for plan in plans for name in plan.changed)
    assert all(f"{plan.bytes:,} of {plan.dense_bytes:,} bytes of linears" in said for plan in plans)
    factored = sum(plan.rows[name].form != "narrow" for plan in plans for name in plan.changed)
    assert 0 < factored < made.total()
    assert decomposed.total() == (len(plans[0].linears) + (0 if kind == "none" else factored))
