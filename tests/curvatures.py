"""Output moments from gradients that a test chooses, or that autograd computes without any hook."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional

from spectrim.anatomy import anatomy
from spectrim.calibrate import Moment, OutputMoment
from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.gradients import run_gradients
from spectrim.calibrate.labels import Labelled
from spectrim.calibrate.moments import OutputSum, Sums
from spectrim.calibrate.passes import prepared
from spectrim.linear import Linear
from spectrim.maths.roots import OutputRoot
from spectrim.maths.sums import Gram
from spectrim.recipe import MetricPart

CPU = torch.device("cpu")
EXACT = 1e-10  # damping that changes nothing visible


def linear(out: int, size: int, *, heads: int | None = None, name: str = "a") -> Linear:
    return Linear(name, "backbone", None, "q" if heads else "up", out, size, heads, torch.float64)


def input_moment(X: torch.Tensor) -> Moment:
    return Moment(Gram.of(X.T @ X), X.abs().sum(0), len(X))


def output_moment(samples, labels: int, form: str = "full", heads: int = 1) -> OutputMoment:
    """Of samples that are pairs of gradients g [positions, out] and inputs x [positions, in]."""
    total = OutputSum.zero(CurvatureForm.read(form), samples[0][0].shape[1], heads, CPU)
    for g, x in samples:
        assert total.add(g, x)
    return OutputMoment(total.form, total.held, total.traces, total.count, labels)


@dataclass
class CurvatureStub:
    """Statistics of one linear, by modality; what metrics read of them."""

    moments: dict[str, Moment]
    outputs: dict[str, OutputMoment]
    path: Path = field(default=Path("stats"))

    @property
    def manifest(self):
        data = SimpleNamespace(modalities=tuple(self.moments))
        return SimpleNamespace(data=data, settings=SimpleNamespace(curvature=True))

    def moment(self, _linear: str, modality: str) -> Moment | None:
        return self.moments.get(modality)

    def output(self, _linear: str, modality: str) -> OutputMoment | None:
        return self.outputs.get(modality)


def curvature(**options) -> MetricPart:
    return MetricPart(kind="curvature", **{"damping": EXACT, **options})


def matrix(root: OutputRoot, size: int) -> torch.Tensor:
    """L [size, size]."""
    return root.times(torch.eye(size, dtype=torch.float64))


def predicted(found, D: torch.Tensor) -> float:
    """The increase of the loss that a Metric predicts of the change D of the weight."""
    total = 0.0
    for root, nats, rows in zip(found.output.roots, found.output.nats, D.chunk(len(found.output.roots)), strict=True):
        X = rows if root is None else root.times(rows)
        total += float(nats * (X @ found.value * X).sum())
    return total


def gather(model, samples, forms: str = "full", fisher: bool = False) -> Sums:
    """The sums of labelled samples."""
    sums, modules = Sums(CPU), {x: model.get_submodule(x.name) for x in anatomy(model).linears}
    with prepared(model):
        for sample in samples:
            run_gradients(
                model, modules, [sample], sums, {x.name: CurvatureForm.read(forms) for x in modules}, fisher=fisher
            )
    return sums


def text(ids: torch.Tensor, sampler: torch.Generator | None = None) -> Labelled:
    """A text sample of the token ids [n]."""
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    return Labelled("text", inputs, torch.ones(len(ids) - 1, dtype=torch.bool), sampler)


def by_autograd(model, sample: Labelled) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """By linear: g [positions, out], x [positions, in] and ∂L/∂W, of the summed loss of one labelled sample.

    No hook is involved: every linear adds a zero to its output, and autograd differentiates with respect to that.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    modules = {x.name: model.get_submodule(x.name) for x in anatomy(model).linears}

    def replaced(name, module):
        def forward(x):
            zero = torch.zeros(*x.shape[:-1], module.out_features, dtype=x.dtype, requires_grad=True)
            seen[name] = (zero, x)
            return functional.linear(x, module.weight, module.bias) + zero

        return forward

    for name, module in modules.items():
        module.forward = replaced(name, module)
    try:
        logits = model(**sample.inputs, use_cache=False).logits[0, :-1][sample.labelled]
        labels = sample.inputs["input_ids"][0, 1:][sample.labelled]
        loss = -logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()
        asked = [zero for zero, _ in seen.values()] + [modules[name].weight for name in seen]
        gradients = torch.autograd.grad(loss, asked, allow_unused=True)
    finally:
        for module in modules.values():
            del module.forward
    found = {}
    for (name, (_, x)), g, weight in zip(seen.items(), gradients, gradients[len(seen) :], strict=False):
        if g is not None:
            found[name] = (g.flatten(0, -2), x.detach().flatten(0, -2), weight)
    return found
