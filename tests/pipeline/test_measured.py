"""What plans were found to cost: kept, told of other plans of the recipe, and written into checkpoints."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from torch.nn.functional import kl_div

import families
from helpers.command import run
from helpers.samples import processor
from spectrim.calibrate import calibrate
from spectrim.calibrate.data import load_data
from spectrim.checkpoint import read_provenance
from spectrim.errors import BudgetError, RecipeError, StatisticsError
from spectrim.pipeline import compression
from spectrim.pipeline.budget import Budget
from spectrim.pipeline.measured import Measured
from spectrim.pipeline.outlook import RATIOS, outlook
from spectrim.pipeline.stages import Compression
from spectrim.plan.plan import Plan


@pytest.fixture
def places(words, tmp_path):
    """A model directory and its statistics, of both modalities."""
    model = families.FAMILIES["llava"]()
    model.save_pretrained(tmp_path / "dense")
    processor("llava").save_pretrained(tmp_path / "dense")
    text = shutil.copy(words, tmp_path / "words.txt")
    given = {"text": str(text), "images": "builtin", "samples": 4, "seqlen": 16, "answer_tokens": 4, "curvature": True}
    calibrate(model, tmp_path / "s", processor=processor("llava"), **given)
    return tmp_path


@contextmanager
def prepared(places, recipe="curvature", **changes):
    given = {"stats": places / "s", "processor": processor("llava"), "changes": changes}
    with compression(families.FAMILIES["llava"](), recipe, **given) as found:
        yield found


def test_costs_lie_on_lines_of_logarithms_between_and_grow_with_predictions_beyond(places):
    with prepared(places) as found:
        known = found.measured
        assert not known
        known.add(0.01, {"text": 0.02, "image": 0.1})
        assert known.at(0.03) == pytest.approx({"text": 0.06, "image": 0.3})
        known.add(0.04, {"text": 0.04, "image": 1.6})
        again = Measured(found.statistics, found.parts, found.recipe)
    assert again
    for predicted, wanted in (
        (0.01, (0.02, 0.1)), (0.02, (0.02 * 2**0.5, 0.4)), (0.04, (0.04, 1.6)),  # as the root, as the square
        (0.005, (0.01, 0.05)), (0.08, (0.08, 3.2)), (0.0, (0.0, 0.0)),
    ):  # fmt: skip
        assert tuple(again.at(predicted).values()) == pytest.approx(wanted)


@torch.no_grad()
def test_what_is_measured_is_the_divergence_on_other_samples(places, monkeypatch):
    made = []
    applied = Compression.applied
    monkeypatch.setattr(Compression, "applied", lambda self, plan: made.append(plan) or applied(self, plan))
    with prepared(places) as found:
        plain = outlook(found, Budget(retain=0.4))
        assert plain.nats is None
        assert all(point.nats is None for point in plain.curve)
        seen = outlook(found, Budget(retain=0.4), measured=True)
        assert len(made) == 1 + len(RATIOS)
        assert made[0] == seen.plan == plain.plan
        outlook(found, Budget(retain=0.4), measured=True)
        assert len(made) == 1 + len(RATIOS)  # known
        assert asdict(outlook(found, Budget(retain=0.4))) == asdict(seen)
        data = load_data(
            found.model, found.processor, text=str(places / "words.txt"), images=None, samples=4, seqlen=16, seed=1,
            instruction="", sees=False,
        )  # fmt: skip
        dense = found.model(input_ids=data.windows).logits[:, :-1].log_softmax(-1)
        with applied(found, seen.plan) as small:
            other = small(input_ids=data.windows).logits[:, :-1].log_softmax(-1)
    wanted = kl_div(other, dense, reduction="sum", log_target=True) / (4 * 15)
    assert seen.nats["text"] == pytest.approx(float(wanted), rel=1e-3)
    assert seen.nats["image"] > 0
    assert [point.nats for point in seen.curve][-1] == {"text": 0.0, "image": 0.0}
    assert "by what was measured: text" in seen.lines()[1]


def test_the_command_line_measures_and_checkpoints_record_it(places, capsys, tmp_path):
    given = ("--stats", places / "s", "--recipe", "curvature", "--retain", "0.4")
    code, said, _ = run(capsys, "plan", places / "dense", *given, "--measure", "--json", tmp_path / "plan.json")
    assert code == 0
    nats = json.loads((tmp_path / "plan.json").read_text())["nats"]
    assert f"by what was measured: text {nats['text']:.4f}, image {nats['image']:.4f} nats" in said
    assert run(capsys, "compress", places / "dense", "-o", tmp_path / "small", *given)[0] == 0
    assert read_provenance(tmp_path / "small")["predicted_loss"] == pytest.approx(nats)
    # another recipe has measurements of its own
    assert (
        run(capsys, "plan", places / "dense", *given, "--set", "metric.gamma=0.7", "--json", tmp_path / "b.json")[0]
        == 0
    )
    assert json.loads((tmp_path / "b.json").read_text())["nats"] is None


def test_what_cannot_be_measured_is_said_before_the_model_is_loaded(places, capsys):
    given = ("plan", places / "dense", "--retain", "0.4", "--stats", places / "s", "--measure")
    for recipe in ("svd-llm", "svd"):
        code, _, said = run(capsys, *given, "--recipe", recipe)
        assert code == 2
        assert f"recipe '{recipe}' predicts no losses" in said
    (places / "dense" / "model.safetensors").unlink()
    (places / "words.txt").unlink()
    code, _, said = run(capsys, *given)
    assert code == 2
    assert "words.txt is gone" in said


def test_a_damaged_file_is_named(places):
    with prepared(places) as found:
        found.measured.add(0.1, {"text": 0.2})
    (file,) = (places / "s" / "measured").iterdir()
    row = '{"predicted": 0.1, "nats": {"text": 0.2}}'
    wrong = ("{}", '{"text": NaN}', '{"text": -1}', '{"text": 0.2, "image": 0.1}')
    for content in (
        "{", '{"plans": [{"predicted": 0.1}]}', '{"plans": 3}', f'{{"plans": [{row.replace("0.1", "0")}]}}',
        *(f'{{"plans": [{row}, {{"predicted": 0.2, "nats": {nats}}}]}}' for nats in wrong),
    ):  # fmt: skip
        file.write_text(content)
        with prepared(places) as found, pytest.raises(StatisticsError, match="is damaged"):
            bool(found.measured)


def test_a_recipe_without_predictions_measures_nothing(places):
    with prepared(places, "svd-llm") as found, pytest.raises(RecipeError, match="predicts no losses"):
        outlook(found, Budget(retain=0.4), measured=True)


def test_a_plan_that_is_passed_back_has_the_predicted_loss_of_its_linears(places, capsys, tmp_path):
    given = ("--stats", places / "s", "--recipe", "curvature")
    assert run(capsys, "plan", places / "dense", *given, "--retain", "0.4", "--measure")[0] == 0
    assert run(capsys, "compress", places / "dense", "-o", tmp_path / "a", *given, "--retain", "0.4")[0] == 0
    plan = ("--plan", tmp_path / "a" / "plan.json")
    assert run(capsys, "compress", places / "dense", "-o", tmp_path / "b", *given, *plan)[0] == 0
    assert all(nats > 0 for nats in read_provenance(tmp_path / "b")["predicted_loss"].values())
    anchored = ("--set", "compensate.kind=anchored")
    assert run(capsys, "compress", places / "dense", "-o", tmp_path / "c", *given, *plan, *anchored)[0] == 0
    assert read_provenance(tmp_path / "c")["predicted_loss"] is None


def test_other_samples_are_not_measured(places):
    with prepared(places) as found:
        (places / "words.txt").write_text("w5 " * 400)
        with pytest.raises(StatisticsError, match="are not those of"):
            outlook(found, Budget(retain=0.4), measured=True)


def test_tables_that_are_rounded_in_any_case_cost_what_they_cost(places):
    with prepared(places, **{"quantize.embeddings": 4}) as found:
        found.measured.add(0.01, {"text": 0.02})
        assert found.measured.at(0.0) == found.measured.at(0.001) == pytest.approx({"text": 0.02})
        assert found.measured.at(0.02) == pytest.approx({"text": 0.04})


def test_a_narrower_mlp_keeps_the_same_units_in_all_its_linears_whatever_the_recipe(places):
    plan = None
    for recipe, narrow in (("spectrim", True), ("spectrim", False), ("svd", False)):
        changes = {"storage.narrow": narrow, "compensate.kind": "none"}
        with prepared(places, recipe, **changes) as found:
            if plan is None:
                units = next((reader, first) for reader, first in found.maker.units.items() if len(first) == 2)
                rows = {name: {"form": "narrow", "outputs": 16, "bytes": 0, "dense_bytes": 0} for name in units[1]}
                rows[units[0]] = {"form": "narrow", "inputs": 16, "bytes": 0, "dense_bytes": 0}
                plan = Plan.model_validate({"recipe": "spectrim", "linears": rows})
            with found.applied(plan.fitted(found.parts)) as small:
                kept = [small.get_submodule(name).units.tolist() for name in (units[0], *units[1])]
            assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize(("name", "side"), [("q_proj", "outputs"), ("o_proj", "inputs"), ("gate_proj", "inputs")])
def test_units_of_what_is_no_mlp_are_refused(places, name, side):
    with prepared(places) as found:
        linear = next(x.name for x in found.parts.linears if x.name.endswith(name))
        rows = {linear: {"form": "narrow", side: 8, "bytes": 0, "dense_bytes": 0}}
        plan = Plan.model_validate({"recipe": "spectrim", "linears": rows})
        with pytest.raises(BudgetError, match=f"takes {side} from '{linear}', which are no units of an MLP"):
            plan.fitted(found.parts)
