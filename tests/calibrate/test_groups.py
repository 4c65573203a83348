"""Blocks gathered a group at a time: what fits together, the same sums under every limit, and going on after each."""

from itertools import groupby, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import FAMILIES, FURTHER
from helpers.calibrated import assert_same_bits
from helpers.samples import processor
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate, memory, outlook, run, snapshot
from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.groups import Share, grouped, input_shares, output_shares, total
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.errors import StatisticsError, UsageError
from spectrim.linear import Linear
from spectrim.maths import sums as sums_of_products
from spectrim.settings import CalibrationOptions


def one(number: int, block: str | None, width: int = 8) -> Linear:
    return Linear(f"{block}.l{number}", "backbone", block, "up", width, width, None, torch.float32)


@st.composite
def models(draw: st.DrawFn) -> list[Share]:
    found = []
    for block in range(draw(st.integers(1, 6))):
        for number in range(draw(st.integers(1, 4))):
            found.append(Share((one(number, f"b{block}"),), draw(st.integers(0, 50))))
    return found


@settings(max_examples=200, deadline=None)
@given(models(), st.integers(0, 200))
def test_groups_fit_the_limit_and_leave_blocks_whole(shares, limit):
    size = {share.linears[0].name: share.nbytes for share in shares}
    if max(size.values()) > limit:
        with pytest.raises(UsageError, match=r"moments of .* raise --memory or lower --batch-size"):
            grouped(shares, limit)
        return
    groups = grouped(shares, limit)
    assert [x.name for group in groups for x in group] == [*size]
    weights = [sum(size[x.name] for x in group) for group in groups]
    assert max(weights) <= limit
    if sum(size.values()) <= limit:
        assert len(groups) == 1
    for _, block in groupby(shares, key=lambda share: share.block):
        names = [share.linears[0].name for share in block]
        if sum(map(size.get, names)) <= limit:
            assert sum(any(x.name in names for x in group) for group in groups) == 1
    for before, after in pairwise(groups):  # nothing is put off that would fit
        inside = [x for x in after if x.block == after[0].block]
        if total([s for s in shares if s.block == after[0].block]) <= limit:
            assert sum(size[x.name] for x in (*before, *inside)) > limit


def test_what_linears_take(parts):
    linears = [x for x in parts.linears if x.block == parts.blocks()[0]]
    hidden, inner = linears[0].in_features, next(x for x in linears if x.role == "down").in_features
    assert total(input_shares(linears)) == 8 * (3 * hidden * (hidden + 1) + inner * (inner + 1))
    forms = {x.name: CurvatureForm("full") for x in linears} | {linears[0].name: CurvatureForm("diagonal")}
    outputs = sum(8 * x.out_features**2 for x in linears[1:]) + 8 * linears[0].out_features
    assert total(output_shares(linears, forms, fisher=False)) == outputs
    assert total(output_shares(linears, {}, fisher=True)) == sum(8 * x.in_features for x in linears)


@pytest.fixture(scope="module")
def demo():
    source = resolve("demo")
    options = {"samples": 3, "seqlen": 24, "gradients": True, "labels": "sampled", "answer_tokens": 3}
    return load(source), {"processor": load_processor(source), **options}


def two_blocks(model) -> int:
    """Room for the moments of the two blocks that have the largest."""
    linears = anatomy(model).linears
    forms = {x.name: CurvatureForm("full") for x in linears}
    sizes = {}
    for shares in (input_shares(linears), output_shares(linears, forms, fisher=True)):
        for block, inside in groupby(shares, key=lambda share: share.block):
            sizes[block] = max(sizes.get(block, 0), total([*inside]))
    return sum(sorted(sizes.values())[-2:])


def test_the_same_bits_under_every_limit_and_after_every_stop(demo, tmp_path, monkeypatch, caplog):
    model, options = demo
    monkeypatch.setattr(sums_of_products, "few_rows", lambda width: width // 16)  # both rows and matrices
    whole = calibrate(model, tmp_path / "whole", **options)
    assert [len(groups) for groups in whole.manifest.groups.values()] == [1, 1, 1, 1]
    sums = []
    monkeypatch.setattr(memory, "room", lambda *_: two_blocks(model))
    kept = run.SnapshotStore.restore
    monkeypatch.setattr(run.SnapshotStore, "restore", lambda *a: sums.append(found := kept(*a)) or found)

    def stop(done, total):
        if done >= at[0]:
            raise KeyboardInterrupt

    at, stops = [7], 0
    while True:
        try:
            caplog.set_level("INFO", "spectrim")
            parts = calibrate(model, tmp_path / "parts", **options, progress=stop)
            break
        except KeyboardInterrupt:
            stops += 1
            at[0] += 6
            with pytest.raises(StatisticsError, match="was interrupted"):
                Statistics.open(tmp_path / "parts")
            if stops == 2:  # what is left goes on in groups of another size
                monkeypatch.setattr(memory, "room", lambda *_: 2 * two_blocks(model))
    counts = [len(groups) for groups in parts.manifest.groups.values()]
    assert min(counts) > 1
    assert stops > 2
    assert "passes over text, " in caplog.text
    largest = max(
        sum(m.gram.nbytes for m in found.moments.values())
        + sum(o.held["output"].nbytes for o in found.outputs.values())
        for found in sums
    )
    assert largest <= 2 * two_blocks(model)
    for linear in anatomy(model).linears:
        for modality in ("text", "image"):
            for kind in ("moment", "gradient", "output"):
                a, b = (getattr(x, kind)(linear.name, modality) for x in (whole, parts))
                assert (a is None) == (b is None)
                if kind == "moment" and a is not None:
                    assert torch.equal(a.second, b.second)
                    assert (a.count, *a.abs_sum) == (b.count, *b.abs_sum)
                elif kind == "gradient" and a is not None:
                    assert torch.equal(a.fisher_cols, b.fisher_cols)
                elif a is not None:
                    assert torch.equal(a.sums["output"], b.sums["output"])
                    assert torch.equal(a.traces, b.traces)
                    assert (a.count, a.labels) == (b.count, b.labels)


def test_another_limit_opens_what_is_finished(words, tmp_path, monkeypatch):
    options = {"processor": processor("llama"), "text": words, "samples": 2, "seqlen": 8}
    calibrate(FAMILIES["llama"](), tmp_path / "a", **options)
    calibrate(FAMILIES["llama"](), tmp_path / "b", **options)
    monkeypatch.setattr(memory, "room", lambda *_: 10**6)
    found = calibrate(FAMILIES["llama"](), tmp_path / "a", **options, memory="1TB")
    assert found.manifest == Statistics.open(tmp_path / "b").manifest
    assert_same_bits(tmp_path / "a", tmp_path / "b")


def test_too_little_memory_is_said_before_samples_run(words, tmp_path):
    options = {"processor": processor("llama"), "text": words, "samples": 2, "seqlen": 8}
    with pytest.raises(UsageError, match=r"moments of model\.layers\.\S+ take .* leaves 0 bytes .* raise --memory"):
        calibrate(FAMILIES["llama"](), tmp_path / "s", **options, memory="100MB")
    assert not (tmp_path / "s").exists()


def test_the_limit_is_what_was_asked_for_or_most_of_what_is_free(monkeypatch):
    cpu = torch.device("cpu")
    assert memory.limit_bytes("20GiB", cpu) == 20 * 2**30
    assert memory.limit_bytes("1.5 gb", cpu) == 1_500_000_000
    monkeypatch.setattr(memory, "free_memory", lambda _: 1000)
    monkeypatch.setattr(memory, "held_memory", lambda _: 7)
    assert memory.limit_bytes(None, cpu) == 907


def test_the_memory_of_a_control_group_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    free = memory.free_memory(torch.device("cpu"))
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 50\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(torch.device("cpu")) > free / 2
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.free_memory(torch.device("cpu")) == 350


def test_a_batch_takes_more_with_more_tokens_and_with_gradients():
    model = FAMILIES["llama"]()
    parts, options = anatomy(model), CalibrationOptions(images=None)

    def taken(tokens, **changes):
        return memory.batch_bytes(
            model,
            parts,
            {"text": {"backbone": tokens}},
            options.model_copy(update=changes),
            recomputes=True,
        )

    assert taken(64) < taken(128)
    assert taken(128, curvature=False) < taken(128)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_5_moe", "deepseek_v3"])
def test_each_expert_has_a_moment_of_its_own(family):
    """Gate and up of one expert, or of an MLP beside experts, share theirs, and no others do."""
    linears = anatomy((FAMILIES | FURTHER)[family]()).linears
    gates = [share for share in input_shares(linears) if share.linears[0].role in ("gate", "up")]
    assert {frozenset(x.name.rpartition(".")[0] for x in share.linears) for share in gates} == {
        frozenset([x.name.rpartition(".")[0]]) for x in linears if x.role == "gate"
    }


def test_smaller_forms_are_advised_for_output_moments_alone():
    shares = [Share((one(0, "b0"),), 100)]
    with pytest.raises(UsageError, match=r"^moments of .* raise --memory or lower --batch-size$"):
        grouped(shares, 10)
    with pytest.raises(UsageError, match=r"^output moments of .*--curvature-form up=sketch:256$"):
        grouped(shares, 10, outputs=True)


def test_experts_read_their_share_of_a_batch_alone():
    model = FAMILIES["mixtral"]()
    parts, options = anatomy(model), CalibrationOptions(images=None)
    experts = 1 + max(x.expert or 0 for x in parts.linears)
    chosen = model.config.num_experts_per_tok
    assert memory.expert_share(model, parts, options) == chosen / experts < 1
    every = options.model_copy(update={"all_experts": True})
    assert memory.expert_share(model, parts, every) == 1
    positions = {"text": {"backbone": 4096}}
    some, whole = (memory.batch_bytes(model, parts, positions, x, recomputes=True) for x in (options, every))
    assert some < whole
    assert memory.expert_share(FAMILIES["llama"](), anatomy(FAMILIES["llama"]()), options) == 1


def test_a_disk_that_is_too_small_is_said_before_samples_run(words, tmp_path, monkeypatch):
    options = {"processor": processor("llama"), "text": words, "samples": 2, "seqlen": 8}
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StatisticsError, match=r"s will take \d+ kB and its disk has 1\.0 kB left; choose another disk"):
        calibrate(FAMILIES["llama"](), tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_what_is_foreseen_of_shapes_is_what_happens(words, tmp_path):
    """Passes and disk, with and without samples at hand; more memory never takes more time."""
    options = {"text": words, "images": None, "samples": 2, "seqlen": 8}
    found = calibrate(FAMILIES["llama"](), tmp_path / "s", processor=processor("llama"), **options)
    with torch.device("meta"):
        model = FAMILIES["llama"]()
    parts, chosen = anatomy(model), CalibrationOptions(**options)
    passes, estimate = outlook.outlook(model, parts, None, chosen)
    assert passes == {kind: len(groups) for kind, groups in found.manifest.groups.items()}
    files = sum(path.stat().st_size for path in (tmp_path / "s").glob("*.safetensors"))
    assert 0.9 * files < estimate.disk < files
    assert estimate.seconds > 0
    tokens = {"backbone": 1e6}
    block = [x for x in parts.linears if x.block == parts.blocks()[1]]
    once = outlook._work(parts, block, tokens, share=1.0, gradients=True, again=False)
    assert once < outlook._work(parts, block, tokens, share=1.0, gradients=True, again=True)
    inputs = sum(2 * x.in_features**2 for x in block if x.role in ("q", "o", "gate", "down")) * 1e6
    forward = sum(2 * x.params for x in parts.linears) * 1e6
    assert outlook._work(parts, block, tokens, share=1.0, gradients=False, again=True) == pytest.approx(
        inputs + forward
    )


def test_a_group_may_hold_linears_that_nothing_reaches_alone(words, pictures, tmp_path, monkeypatch):
    """Text reaches no tower, and LLaVA does not read its tower's last block; also where that is all that is left."""
    model, options = FAMILIES["llava"](), {"processor": processor("llava"), "text": words, "images": pictures}
    options |= {"samples": 2, "seqlen": 8, "curvature": True, "answer_tokens": 2}
    whole = calibrate(model, tmp_path / "whole", **options)
    alone = [*anatomy(model).blocks("tower"), None]

    def by_block(*arguments):
        found = memory_passes(*arguments)
        names = [
            [x.name for x in anatomy(model).linears if (x.block if x.place == "tower" else None) == b] for b in alone
        ]
        return {kind: tuple(map(tuple, names)) if "gradients" in kind else groups for kind, groups in found.items()}

    memory_passes = memory.passes
    monkeypatch.setattr(memory, "passes", by_block)

    def stop(done, total):
        if done == at:
            raise KeyboardInterrupt

    for at in (8, 10, 14, None):
        try:
            parts = calibrate(model, tmp_path / "parts", **options, progress=stop, checkpoint_seconds=0)
        except KeyboardInterrupt:
            assert at is not None
    for linear in anatomy(model).linears:
        for modality in ("text", "image"):
            a, b = (x.output(linear.name, modality) for x in (whole, parts))
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a.sums["output"], b.sums["output"])


def test_what_text_does_not_reach_costs_nothing_there():
    model = FAMILIES["llava"]()
    parts, options = anatomy(model), CalibrationOptions()
    forms = {x.name: CurvatureForm("full") for x in parts.linears}
    places = {x.name: x.place for x in parts.linears}
    found = memory.passes(parts, options.settings, ["text", "image"], forms, 250_000, rows=64)
    assert min(len(found[kind]) for kind in ("text-gradients", "image-gradients")) > 1
    for group in found["text-gradients"]:
        assert any(places[name] == "backbone" for name in group)
