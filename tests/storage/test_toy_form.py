"""A form that is defined outside: from options to a fresh process, with no line of spectrim about it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import families
from families import example_inputs
from helpers.forks import fork
from helpers.samples import processor
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate
from spectrim.errors import BudgetError, CheckpointError
from spectrim.evaluate import perplexity
from spectrim.pipeline import compression
from spectrim.plan import Plan
from spectrim.storage import base, stored_layers
from spectrim.storage.lora import lora_targets

NAME = "diagonal+low-rank"
RECIPES = {
    "loss": ("curvature", {}),
    "energy": ("jw-svd", {}),
    "uniform": ("svd-llm", {}),
    "threshold": ("jw-svd", {"allocation.rule": "global-sigma"}),
    "compensated": ("spectrim", {"compensate.refine": 2}),
}

FRESH = """
import sys
import torch
from helpers import toy_form  # registers the form
import spectrim
from spectrim import cli
from transformers import AutoModelForCausalLM

directory, inputs, words, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory)
ids = torch.load(inputs)
found = {"logits": model(ids).logits, "tokens": model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)}
model.dequantize()
assert all(type(module).__module__.split(".")[0] != "helpers" for module in model.modules())
found["dense"] = model(ids).logits
torch.save({name: tensor.detach() for name, tensor in found.items()}, f"{out}.pt")
options = ["--tasks", "perplexity", "--text", words, "--seqlen", "16", "--json", out]
sys.argv = ["spectrim", "evaluate", directory, *options]
cli.main()
"""


@pytest.fixture(autouse=True)
def registered():
    """The form is known inside a test, and to no other test."""
    before = dict(base._FORMS)
    from helpers import toy_form

    base.register(toy_form.ToyForm())
    yield
    base._FORMS.clear()
    base._FORMS.update(before)
    base._FORMS.pop(NAME, None)


def diagonal_model():
    """A few-layer Llama that this form suits."""
    model = families.FAMILIES["llama"]()
    for linear in anatomy(model).linears:
        model.get_submodule(linear.name).weight.data.diagonal().add_(0.3)
    return model


@pytest.fixture(scope="module")
def statistics(words, tmp_path_factory):
    options = {"text": words, "samples": 12, "seqlen": 16, "curvature": True}
    return calibrate(diagonal_model(), tmp_path_factory.mktemp("toy") / "s", processor=processor("llama"), **options)


@pytest.mark.parametrize("name", RECIPES)
def test_every_rule_plans_it_and_compensation_makes_it(name, statistics):
    recipe, changes = RECIPES[name]
    model = diagonal_model()
    with compression(model, recipe, stats=statistics, changes=changes, processor=processor("llama")) as prepared:
        plan = prepared.plan(0.5)
        assert Counter(row.form for row in plan.linears.values())[NAME] >= 4
        assert plan.bytes <= 0.5 * plan.dense_bytes
        ids = example_inputs(model)["input_ids"]
        before = model(ids).logits
        with prepared.applied(plan) as small:
            layers = stored_layers(small)
            assert {name: layer.form for name, layer in layers.items()} == {
                name: plan.linears[name].form for name in plan.changed
            }
            held = sum(t.nbytes for layer in layers.values() for t in layer.tensors().values())
            assert held == sum(plan.linears[name].bytes for name in plan.changed)
            assert not torch.equal(small(ids).logits, before)
        assert torch.equal(model(ids).logits, before)


def test_the_predicted_loss_of_an_option_is_that_of_its_tensors(statistics):
    model = diagonal_model()
    with compression(model, "curvature", stats=statistics, processor=processor("llama")) as prepared:
        plan = prepared.plan(0.5)
        predicted = prepared.predicted(plan)
    (total,) = predicted.values()
    assert total == pytest.approx(plan.loss, rel=0.1)  # damped or not


def test_it_saves_loads_generates_evaluates_and_dequantizes_in_a_fresh_process(statistics, words, tmp_path):
    model, reader = diagonal_model(), processor("llama")
    given = {"stats": statistics, "processor": reader, "changes": {"storage.narrow": False}}
    with compression(model, "spectrim", **given) as prepared:
        plan = prepared.plan(0.5)
        directory = prepared.save(plan, tmp_path / "small", processor=reader, keep=True)
    assert Plan.read(directory / "plan.json", anatomy(diagonal_model())).bytes == plan.bytes
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert {entry["form"] for entry in config["forms"].values()} == {NAME}
    ids = example_inputs(model)["input_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    out = tmp_path / "results.json"
    given = [str(directory), str(tmp_path / "ids.pt"), words, str(out)]
    run = fork("-c", FRESH, *given, environment={"PATH": ""})
    assert run.returncode == 0, run.stderr
    found = torch.load(f"{out}.pt")
    torch.testing.assert_close(found["logits"], model(ids).logits.detach())
    torch.testing.assert_close(found["dense"], found["logits"], rtol=1e-4, atol=1e-4)
    assert torch.equal(found["tokens"], model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))
    (measured,) = json.loads(out.read_text())["results"]
    text = Path(words).read_text()
    expected = perplexity(model, reader, text, seqlen=16)
    assert measured["perplexity"]["per_token"] == pytest.approx(expected.per_token, rel=1e-4)


def test_without_the_package_that_registers_it_a_checkpoint_says_so(statistics, tmp_path):
    model, reader = diagonal_model(), processor("llama")
    with compression(model, "spectrim", stats=statistics, processor=reader) as prepared:
        directory = prepared.save(prepared.plan(0.5), tmp_path / "small", processor=reader)
    del base._FORMS[NAME]
    with pytest.raises(CheckpointError, match=r"no form of storage 'diagonal\+low-rank', only dense, .* import"):
        type(model).from_pretrained(directory)
    with pytest.raises(BudgetError, match=r"no form of storage 'diagonal\+low-rank'"):
        Plan.read(directory / "plan.json")


def test_training_sees_its_parameters(statistics):
    model = diagonal_model()
    with compression(model, "curvature", stats=statistics, processor=processor("llama")) as prepared:
        small = prepared.apply(prepared.plan(0.5))
    ids = example_inputs(small)["input_ids"]
    small(input_ids=ids, labels=ids).loss.backward()
    layer = next(layer for layer in stored_layers(small).values() if layer.form == NAME)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())
    if {layer.form for layer in stored_layers(small).values()} == {NAME}:  # it has no plain linear
        assert all(type(small.get_submodule(target)) is torch.nn.Linear for target in lora_targets(small))
