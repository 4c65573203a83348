"""What `spectrim plan` says is what `spectrim compress` makes, and the curve is that of its own plans."""

import json

import pytest

import families
from helpers.command import run
from helpers.samples import processor
from spectrim.calibrate import calibrate
from spectrim.pipeline import compression
from spectrim.pipeline.budget import Budget
from spectrim.pipeline.outlook import outlook
from spectrim.plan.plan import Plan


@pytest.fixture(scope="module")
def places(words, tmp_path_factory):
    """A model directory and its statistics."""
    home = tmp_path_factory.mktemp("outlook")
    model = families.FAMILIES["llava"]()
    model.save_pretrained(home / "dense")
    processor("llava").save_pretrained(home / "dense")
    calibrate(model, home / "s", processor=processor("llava"), text=words, samples=4, seqlen=16, curvature=True)
    return home


@pytest.fixture(scope="module")
def found(places):
    model = families.FAMILIES["llava"]()
    given = {"stats": places / "s", "processor": processor("llava"), "changes": {"quantize.bits": "auto"}}
    with compression(model, "curvature", **given) as prepared:
        yield prepared, outlook(prepared, Budget(retain=0.4))


def test_parts_add_up_to_the_plan(found):
    prepared, seen = found
    plan = prepared.plan(0.4)
    assert seen.plan == plan
    assert sum(part.bytes for part in seen.parts) == plan.bytes
    assert sum(part.dense_bytes for part in seen.parts) == plan.dense_bytes
    assert sum(part.loss for part in seen.parts) == pytest.approx(plan.loss)
    assert sum(part.linears for part in seen.parts) == len(plan.linears)
    assert all(sum(part.forms.values()) == part.linears for part in seen.parts)
    for part in seen.parts:
        rows = [x for x in prepared.parts.linears if (x.place, x.role) == (part.place, part.role)]
        assert part.bits == pytest.approx(8 * part.bytes / sum(x.params for x in rows))
    assert seen.file_bytes == prepared.sizes.of(plan)


def test_the_curve_rises_in_bytes_and_falls_in_loss(found):
    prepared, seen = found
    assert len(seen.curve) >= 5
    sizes = [point.file_bytes for point in seen.curve]
    losses = [point.loss for point in seen.curve]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
    assert sizes[-1] <= prepared.sizes.dense
    for point in (*seen.curve, seen.less, seen.more):
        again = prepared.plan(point.linear_bytes / seen.plan.dense_bytes)
        assert again.bytes == point.linear_bytes
        assert again.loss == pytest.approx(point.loss)
    assert seen.less.loss > seen.plan.loss > seen.more.loss
    assert 0.85 * seen.plan.bytes < seen.less.linear_bytes <= 0.9 * seen.plan.bytes
    bars = [line.count("█") for line in seen.lines()[3:]]
    assert max(bars) == 40
    assert bars == sorted(bars, reverse=True)


def test_other_sizes_are_those_that_would_be_made(places):
    """Where the embedding takes its share of a size, it does so at every size."""
    changes = {"compensate.kind": "none", "quantize.bits": "auto", "quantize.embeddings": "auto"}
    given = {"stats": places / "s", "processor": processor("llava"), "changes": changes}
    with compression(families.FAMILIES["llava"](), "spectrim", **given) as prepared:
        size = round(0.55 * prepared.sizes.dense)
        seen = outlook(prepared, Budget(size=size))
        points = [point for point in (*seen.curve, seen.less, seen.more) if point is not None]
        for point in points:
            assert prepared.planned(Budget(size=point.file_bytes)).loss == pytest.approx(point.loss, rel=0.05)
        assert sorted(point.file_bytes for point in points)[0] < size < prepared.sizes.dense
        assert seen.less.loss > seen.plan.loss > seen.more.loss


def test_a_recipe_without_losses_says_so():
    with compression(families.FAMILIES["llama"](), "svd") as prepared:
        seen = outlook(prepared, Budget(retain=0.5))
    assert (seen.curve, seen.less, seen.more) == ((), None, None)
    assert "predicts no loss" in seen.lines()[0]


def test_compress_makes_what_plan_says(places, capsys, tmp_path):
    given = ("--stats", places / "s", "--recipe", "curvature", "--size", "330kB", "--keep", "*.q_proj")
    code, said, err = run(capsys, "plan", places / "dense", *given, "--json", tmp_path / "plan.json")
    assert code == 0, err
    assert "a tenth less for linears" in said
    assert "kept by" not in said
    content = json.loads((tmp_path / "plan.json").read_text())
    code, _, err = run(capsys, "compress", places / "dense", "-o", tmp_path / "out", *given)
    assert code == 0, err
    assert Plan.model_validate(content["plan"]) == Plan.read(tmp_path / "out" / "plan.json")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size <= content["file_bytes"] <= 330_000
    assert {part["role"] for part in content["parts"]} >= {"q", "k", "v", "o", "gate", "up", "down", "fc1"}
    (tmp_path / "inner.json").write_text(json.dumps(content["plan"]))
    code, _, err = run(
        capsys, "compress", places / "dense", "-o", tmp_path / "again", "--stats", places / "s", "--recipe",
        "curvature", "--plan", tmp_path / "inner.json",
    )  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == size


def test_what_cannot_be_planned_is_refused_early(places, capsys, tmp_path):
    (tmp_path / "there.json").write_text("{}")
    for arguments, message in (
        ((), "give one limit"),
        (("--size", "300kB", "--retain", "0.5"), "give one limit"),
        (("--size", "300kB"), "needs statistics; run `spectrim calibrate`"),
        (("--size", "300kB", "--stats", tmp_path / "none"), "none"),
        (("--size", "300kB", "--stats", places / "s", "--json", tmp_path / "there.json"), "exists; name another file"),
        (("--size", "1kB", "--stats", places / "s"), "takes more than 1kB"),
    ):
        code, _, err = run(capsys, "plan", places / "dense", *arguments)
        assert (code, message in err) == (2, True), err
    assert (tmp_path / "there.json").read_text() == "{}"
