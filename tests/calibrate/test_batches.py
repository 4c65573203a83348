"""Gradient passes over several samples at once, with blocks that run again, and forward passes that end early."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import families
from curvatures import CPU
from helpers.calibrated import assert_same_bits, tensors, tiny
from helpers.samples import word_tokenizer
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate, memory, run
from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.gradients import run_gradients
from spectrim.calibrate.labels import Labelled, together
from spectrim.calibrate.moments import Sums
from spectrim.calibrate.passes import prepared, run_batch
from spectrim.calibrate.route import Route
from spectrim.samples import Batch

FAMILIES = ["llama", "qwen2_5_vl", "mllama", "llava_next", "gemma3", "opt", "phi3", "mixtral"]


class Shared(nn.Module):
    """A feed-forward whose linear runs twice, on rows without samples."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, 64)
        return self.down_proj(self.up_proj(rows).relu() + self.up_proj(rows.tanh())).view_as(x)


def write(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
    args[0].zero_()


def special(kind: str):
    model = tiny("llama")
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = Shared().double()
        if kind == "written":
            layer.register_forward_hook(write)
    return model.eval()


def make(family: str):
    return special(family) if family in ("shared", "written") else tiny(family)


def samples(model, count: int = 3) -> list[Labelled]:
    found = []
    for number in range(count):
        inputs = families.example_inputs(model, seed=number)
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        labelled = torch.arange(inputs["input_ids"].shape[1] - 1) >= 4 + number
        found.append(Labelled("text", inputs, labelled, None))
    return found


def gathered(model, given, size: int, again: bool) -> Sums:
    parts, sums = anatomy(model), Sums(CPU)
    modules = {x: model.get_submodule(x.name) for x in parts.linears}
    forms = {x.name: CurvatureForm("full") for x in modules}
    blocks = {name: model.get_submodule(name) for name in parts.blocks() if again}
    with prepared(model):
        for several in together(given, size):
            if run_gradients(model, modules, several, sums, forms, fisher=True, blocks=blocks):
                continue
            assert size > 1
            for sample in several:  # with experts
                run_gradients(model, modules, [sample], sums, forms, fisher=True, blocks=blocks)
    return sums


def assert_close(a: Sums, b: Sums, *, exact: bool) -> None:
    assert (a.samples, a.labels) == (b.samples, b.labels)
    assert a.outputs.keys() == b.outputs.keys()
    near = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-9, "atol": 1e-14}
    for name, one in a.outputs.items():
        assert one.count == b.outputs[name].count
        torch.testing.assert_close(one.sums["output"], b.outputs[name].sums["output"], **near)
        torch.testing.assert_close(one.traces, b.outputs[name].traces, **near)
        torch.testing.assert_close(a.fisher[name], b.fisher[name], **near)


@pytest.mark.parametrize("family", [*FAMILIES, "shared", "written"])
def test_several_at_once_and_blocks_that_run_again_give_the_same(family):
    model = make(family)
    given = samples(model)
    alone = gathered(model, given, 1, again=False)
    assert alone.samples == 3
    assert_close(gathered(model, given, 1, again=True), alone, exact=True)
    both = gathered(model, given, 2, again=True)
    assert both.batches == (3 if family == "mixtral" else 2)
    assert_close(both, alone, exact=False)
    assert not any("forward" in vars(model.get_submodule(name)) for name in anatomy(model).blocks())
    assert not any(model.get_submodule(x.name)._forward_hooks for x in anatomy(model).linears)


def test_neighbours_of_equal_shapes_go_together():
    def one(length: int) -> Labelled:
        return Labelled("text", {"input_ids": torch.zeros(1, length)}, torch.ones(length - 1, dtype=torch.bool), None)

    given = [one(n) for n in (4, 4, 4, 5, 4, 6, 6)]
    groups = [[sample.inputs["input_ids"].shape[1] for sample in group] for group in together(given, 2)]
    assert groups == [[4, 4], [4], [5], [4], [6, 6]]
    assert [sample for group in together(given, 3) for sample in group] == given


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl"])
def test_a_forward_pass_ends_behind_the_last_block_that_is_wanted(family):
    model = tiny(family)
    parts = anatomy(model)
    inputs = families.example_inputs(model)
    batch = Batch("image", {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}, 1)
    route, ran = Route(model, parts.linears), []
    for name in parts.blocks():
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    everything = {x: model.get_submodule(x.name) for x in parts.linears}
    with prepared(model):
        run_batch(model, everything, batch, whole := Sums(CPU), route=route)
        way = [*ran]
        assert set(way) <= set(parts.blocks())
        for block in way:
            ran.clear()
            wanted = {x: module for x, module in everything.items() if x.block == block}
            run_batch(model, wanted, batch, sums := Sums(CPU), route=route)
            assert ran == way[: way.index(block) + 1]
            assert sums.moments.keys() == whole.moments.keys() & {x.name for x in wanted}
            assert all(torch.equal(one.second, whole.moments[name].second) for name, one in sums.moments.items())
        ran.clear()
        run_batch(model, everything, batch, Sums(CPU), route=route)
        assert ran == way


def test_a_calibration_that_runs_blocks_again_ends_with_the_same_bits(words, tmp_path, monkeypatch):
    model = tiny("llama", torch.float32)
    options = {"processor": word_tokenizer(), "text": words, "samples": 5, "seqlen": 9, "batch_size": 2}
    calibrate(model, tmp_path / "whole", **options)
    fit = memory.fitted
    monkeypatch.setattr(run, "fitted", lambda *a: replace(fit(*a), recomputes=True))
    calls = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    calibrate(model, tmp_path / "again", **options)
    assert_same_bits(tmp_path / "whole", tmp_path / "again")
    assert len(calls) == 3 + 2 + 2 * 3  # inputs of three batches, the check of causality, gradients of three batches
    alone = calibrate(model, tmp_path / "alone", **options | {"batch_size": 1})
    one, other = tensors(alone.path), tensors(tmp_path / "again")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6 * float(tensor.abs().max()))


def test_samples_that_experts_mix_run_alone(words, tmp_path):
    """Rows that are routed to an expert do not say which sample they are of."""
    model = tiny("llama", torch.float64)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2)).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.reshape(-1, 64)
            first = rows[:, 0] > 0
            out = torch.zeros_like(rows)
            for expert, where in zip(self.experts, (first, ~first), strict=True):
                out = out.index_put((where.nonzero()[:, 0],), expert(rows[where]))
            return out.view_as(x)

    torch.manual_seed(2)
    for layer in model.model.layers:
        layer.mlp = Routed()
    options = {"processor": word_tokenizer(), "text": words, "samples": 4, "seqlen": 16, "gradients": True}
    several = calibrate(model, tmp_path / "s", **options, batch_size=4)
    alone = calibrate(model, tmp_path / "a", **options, batch_size=1)
    one, other = tensors(several.path), tensors(alone.path)
    assert one.keys() == other.keys()
    assert any("experts" in name for name in one)
    for name, tensor in one.items():
        if "gradients" in name:
            assert torch.equal(tensor, other[name])
        else:
            torch.testing.assert_close(tensor, other[name], rtol=1e-9, atol=1e-12)
