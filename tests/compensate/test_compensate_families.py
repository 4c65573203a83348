"""The walk over both models in every family: all linears are reached, and residual streams are found."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from compressed import logits
from families import FAMILIES
from random_samples import Samples
from spectrim.anatomy import anatomy
from spectrim.calibrate import Moment
from spectrim.compensate import Compensation, run
from spectrim.compensate.streams import Call, Pass, stopping_at
from spectrim.compensate.tap import Tap
from spectrim.compensate.units import Unit
from spectrim.disk.overflow import Overflow
from spectrim.maths.sums import Gram
from spectrim.plan.plan import Plan, plan_row
from spectrim.recipe import Recipe
from spectrim.storage import filled

# Output projections whose output is normalized, gated or scaled before it is added: they have no stream to correct.
NOT_ADDED = {
    "gemma3": ("language_model",),
    "gemma3_text": ("layers",),
    "internvl": ("vision_tower",),
    "mllama": ("global_transformer", "language_model.layers.1"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_family_is_compensated(family, monkeypatch, tmp_path):
    model = FAMILIES[family]()
    parts, expected = anatomy(model), logits(model)
    ranks = {x.name: max(1, min(x.out_features, x.in_features) // 3) for x in parts.linears}
    rows = {x.name: plan_row(x, "low-rank", {"rank": ranks[x.name]}) for x in parts.linears}
    settings = SimpleNamespace(image_tokens_only=False, batch_size=4)
    data = SimpleNamespace(modalities=("text", "image"))
    manifest = SimpleNamespace(forms={}, settings=settings, data=data, model_dump=lambda mode: {})

    def moment(name: str, _modality: str) -> Moment:
        size = parts.linear(name).in_features
        return Moment(Gram.of(torch.eye(size, dtype=torch.float64)), torch.ones(size, dtype=torch.float64), 1)

    counts = {"positions": lambda *_: 1, "labels": lambda *_: 1}
    statistics = SimpleNamespace(path=tmp_path, manifest=manifest, moment=moment, **counts)
    writers: set[str] = set()
    real = Unit.groups

    def groups(self, calls, *, residual):
        found = real(self, calls, residual=residual)
        writers.update(*(group.writers for group in found))
        return found

    monkeypatch.setattr(Unit, "groups", groups)
    monkeypatch.setattr(run, "reload_data", lambda *_, **__: Samples(model))
    plan = Plan(recipe="jw-svd", linears=rows)

    def alone(linear, row):
        assert linear.expert is not None, f"no sample reaches {linear.name}"
        return {
            "A.weight": torch.ones(linear.out_features, row.spec["rank"]),
            "B.weight": torch.ones(row.spec["rank"], linear.in_features),
        }

    maker = SimpleNamespace(make=alone, removal_of=lambda name: None)
    found = Compensation(model, parts, Recipe.read("jw-svd"), plan, maker, statistics, None).solve()
    assert found.keys() == {linear.name for linear in parts.linears}
    for name, tensors in found.items():
        layer = filled(model.get_submodule(name), "low-rank", rows[name].spec, tensors)
        assert layer.product().isfinite().all(), name
    assert torch.equal(logits(model), expected)
    outputs = {x.name for x in parts.linears if x.block and x.expert is None and x.name.rpartition(".")[2] in OUTPUTS}
    assert writers == {name for name in outputs if not any(part in name for part in NOT_ADDED.get(family, ()))}


OUTPUTS = ("o_proj", "out_proj", "proj", "projection_layer", "fc2", "linear_fc2", "down_proj")


class Toy(nn.Module):
    """Three ways to add the output of a linear, and one product."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        x = x + self.a(x)
        x = self.b(x).view(2, 2, 4).view(4, 4) + x
        y = x.clone()
        y += self.c(x)
        return y + 2 * self.d(y)


def test_what_an_output_is_added_to():
    toy, x = Toy().requires_grad_(False), torch.ones(4, 4)
    modules = dict(toy.named_children())
    tap = Tap(modules, x="abcd", r="abcd").watch(lambda: toy(x), whole=True)
    after = x + toy.a(x)
    second = toy.b(after) + after
    assert set(tap.r) == set("abc")
    for name, expected in {"a": x, "b": after, "c": second}.items():
        torch.testing.assert_close(tap.r[name], expected)
        torch.testing.assert_close(tap.x[name], expected)
    seen = []
    handle = toy.b.register_forward_hook(lambda *_: seen.append("b"))
    short = Tap(modules, x="a", r="a").watch(lambda: toy(x))
    handle.remove()
    assert torch.equal(short.r["a"], x)
    assert not seen
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in toy.modules())


def test_a_pass_stops_at_every_unit_and_gives_errors_and_ends(tmp_path):
    room = Overflow(2**30, tmp_path)
    toy = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).requires_grad_(False)
    x, outputs = torch.ones(1, 2), []
    with stopping_at({"0": toy[0], "2": toy[2]}):
        one = Pass(lambda: outputs.append(toy(x)), "cpu", room)
        one.start()
        assert (one.unit, one.call) == ("0", Call((x,), {}))
        one.answer(torch.tensor([[-1.0, 3.0]]))
        assert one.unit == "2"
        assert torch.equal(one.call.args[0], torch.tensor([[0.0, 3.0]]))
        one.answer("done")
        assert (one.unit, outputs) == (None, ["done"])
        one.close()
        two = Pass(lambda: toy(x), "cpu", room)
        two.start()
        with pytest.raises(TypeError, match="must be Tensor, not str"):
            two.answer("no tensor")
        two.close()
        three = Pass(lambda: toy(x), "cpu", room)
        three.start()
        three.close()
        three.close()
    assert "forward" not in vars(toy[0])
