"""Gradient passes that hand over to the next: the same bits as one pass, with as little of the model run as can be."""

from collections.abc import Iterator
from contextlib import closing
from itertools import groupby

import pytest
import torch

from families import FAMILIES, FURTHER, example_inputs
from helpers.samples import processor
from spectrim.anatomy import Anatomy, anatomy
from spectrim.calibrate import calibrate, memory, relay
from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.gradients import GradientWatch, run_gradients
from spectrim.calibrate.labels import Labelled
from spectrim.calibrate.moments import Sums
from spectrim.calibrate.passes import prepared
from spectrim.calibrate.relay import Relay
from spectrim.errors import StatisticsError
from spectrim.linear import Linear


def samples(model, count: int = 3) -> Iterator[list[Labelled]]:
    """Batches of one sample of the model's own modality; tokens of images are no labels."""
    for seed in range(count):
        inputs = example_inputs(model, seed=seed)
        kind = "image" if "pixel_values" in inputs else "text"
        yield [Labelled(kind, inputs, inputs["input_ids"][0, 1:] < 120, None)]


class Ways:
    """How far forward passes ran: the names of blocks, by pass."""

    def __init__(self, model, parts: Anatomy) -> None:
        self.seen: list[str] = []
        for name in parts.blocks():
            model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: self.seen.append(name))

    def taken(self) -> list[str]:
        seen, self.seen = self.seen, []
        return seen


def run(model, linears, relay: Relay | None, *, again: bool, count: int = 3) -> Sums:
    parts, sums = anatomy(model), Sums(torch.device("cpu"))
    modules = {x: model.get_submodule(x.name) for x in linears}
    blocks = {name: model.get_submodule(name) for name in parts.blocks()} if again else {}
    forms = {x.name: CurvatureForm("full") for x in linears}
    for several in samples(model, count):
        run_gradients(model, modules, several, sums, forms, fisher=True, blocks=blocks, relay=relay)
    return sums


def in_passes(parts: Anatomy) -> list[list[Linear]]:
    """The backbone's linears by block, the second half of each apart from the first; then what comes before it."""
    inside = [x for x in parts.linears if x.place == "backbone" and x.block is not None]
    blocks = [[*same] for _, same in groupby(inside, key=lambda x: x.block)]
    rest = [x for x in parts.linears if x.place != "backbone"]
    return [*([rest] if rest else []), *(half for one in blocks for half in (one[:2], one[2:]))]


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl", "qwen3_vl", "mllama", "mixtral", "gemma4_text"])
@pytest.mark.parametrize("again", [False, True])
def test_the_same_bits_as_in_one_pass(family, again, tmp_path):
    model = (FAMILIES | FURTHER)[family]()
    parts = anatomy(model)
    with prepared(model), closing(Relay(model, parts.linears, tmp_path)) as handed:
        whole, passes = run(model, parts.linears, None, again=again), in_passes(parts)
        found: dict = {}
        fisher: dict = {}
        for wanted, after in zip(passes[::-1], [*passes[-2::-1], ()], strict=True):
            handed.start(wanted, after)
            sums = run(model, wanted, handed, again=again)
            found |= sums.outputs
            fisher |= sums.fisher
    inside = {x.name for one in passes for x in one}
    assert found.keys() == whole.outputs.keys() & inside
    for name, output in found.items():
        assert torch.equal(output.held["output"].dense(), whole.outputs[name].held["output"].dense())
        assert torch.equal(output.traces, whole.outputs[name].traces)
        assert torch.equal(fisher[name], whole.fisher[name])


def blocks_run(family: str, tmp_path) -> list[list[int]]:
    """The backbone's blocks that each of the passes runs for one sample, from the last linears to the first."""
    model = (FAMILIES | FURTHER)[family]()
    parts = anatomy(model)
    names = [*parts.blocks("backbone")]
    with prepared(model), closing(Relay(model, parts.linears, tmp_path)) as handed:
        passes, ways, found = in_passes(parts), Ways(model, parts), list[list[int]]()
        for wanted, after in zip(passes[::-1], [*passes[-2::-1], ()], strict=True):
            handed.start(wanted, after)
            run(model, wanted, handed, again=False, count=1)
            found.append([names.index(name) for name in ways.taken() if name in names])
    return found


def test_a_pass_ends_behind_its_own_blocks(tmp_path):
    """The first pass explores the model with one more forward pass."""
    assert blocks_run("llama", tmp_path) == [[0, 1, 0, 1], [0, 1], [0], [0]]


def test_a_block_whose_keys_later_ones_read_hands_nothing_over(tmp_path):
    """The last block of Gemma 4 reads keys and values of the one before it: gradients at its input are not all."""
    found = blocks_run("gemma4_text", tmp_path)
    assert found[-2:] == [[0, 1], [0, 1]]  # behind the first block there is more than its output


def test_a_tower_whose_features_skip_blocks_waits_behind_the_last_of_them(tmp_path):
    """Qwen3-VL adds features of its tower behind its first blocks, here behind both."""
    assert blocks_run("qwen3_vl", tmp_path)[-1] == [0, 1]
    assert blocks_run("qwen2_5_vl", tmp_path)[-1] == [0]


def test_batches_that_nothing_was_kept_of_run_whole(tmp_path):
    model = FAMILIES["llama"]()
    parts = anatomy(model)
    first, second = ([x for x in parts.linears if x.block == name] for name in parts.blocks())
    with prepared(model), closing(Relay(model, parts.linears, tmp_path)) as handed:
        whole, ways = run(model, parts.linears, None, again=False), Ways(model, parts)
        handed.start(second, first)
        run(model, second, handed, again=False, count=2)
        ways.taken()
        handed.start(first, ())
        found = run(model, first, handed, again=False, count=3)
        assert [name.split(".")[2] for name in ways.taken()] == ["0", "0", "0", "1"]
    for name, output in found.outputs.items():
        assert torch.equal(output.held["output"].dense(), whole.outputs[name].held["output"].dense())


def test_exploring_is_not_watched(tmp_path, monkeypatch):
    """Linears that ran twice would hold their gradients until the end of a batch."""
    waiting, finish = [], GradientWatch.finish
    monkeypatch.setattr(GradientWatch, "finish", lambda self, w: (waiting.append(len(self._waiting)), finish(self, w)))
    blocks_run("llama", tmp_path)
    assert waiting == [0, 0, 0, 0]


def test_a_full_disk_is_said(words, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory, "room", lambda *_: 40_000)
    options = {"processor": processor("llama"), "text": words, "samples": 2, "seqlen": 8}
    monkeypatch.setattr(relay.Shelf, "put", full)
    with pytest.raises(StatisticsError, match=r"s cannot be written \(.*No space left.*make room or choose another"):
        calibrate(FAMILIES["llama"](), tmp_path / "s", **options)
