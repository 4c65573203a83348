"""A form of storage that spectrim knows nothing of: a diagonal beside two thin factors. Importing it registers it."""

from typing import Any

import torch
from torch import nn

from spectrim.errors import ModelError
from spectrim.maths.decompose import decompose, factors
from spectrim.storage import Form, Options, Problem, Spec, StoredLayer, Tensors, register


class DiagonalPlusLowRank(StoredLayer):
    """``y = left (right x) + diagonal · x + bias``, the diagonal as far as there are inputs and outputs."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, torch.nan, **like), requires_grad=linear.weight.requires_grad)

        self.left, self.right = empty(self.out_features, rank), empty(rank, self.in_features)
        self.diagonal = empty(min(self.in_features, self.out_features))
        self.bias = linear.bias

    @property
    def form(self) -> str:
        return "diagonal+low-rank"

    @property
    def spec(self) -> dict[str, Any]:
        return {"rank": len(self.right)}

    def product(self) -> torch.Tensor:
        self.check_values()
        return self.left @ self.right + _placed(self.diagonal, self.out_features, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(nn.functional.linear(input, self.right), self.left, self.bias)
        n = len(self.diagonal)
        return y + nn.functional.pad(input[..., :n] * self.diagonal, (0, self.out_features - n))


class ToyForm(Form):
    name = "diagonal+low-rank"
    marker = "diagonal"
    searches = True

    def options(self, problem: Problem) -> Options:
        if problem.heads > 1 or problem.quantize.bits is not None:
            return Options.listed(self.name, [])
        spectrum = decompose(_rest(problem), problem.C, problem.output)
        each = (spectrum.s if spectrum.loss is None else spectrum.loss).tolist()
        ranks = range(1, len(each), 3)
        rows = [(self.nbytes(problem.linear, {"rank": k}), sum(each[k:]), {"rank": k}) for k in ranks]
        return Options.listed(self.name, rows)

    def make(self, problem: Problem, spec: Spec) -> Tensors:
        W = _rest(problem)
        left, right = factors(W, *decompose(W, problem.C, problem.output).directions(spec["rank"]))
        tensors = {"left": left, "right": right, "diagonal": problem.W.double().diagonal()}
        return {name: tensor.to(problem.linear.dtype).contiguous() for name, tensor in tensors.items()}

    def build(self, linear: nn.Linear, spec: Spec) -> DiagonalPlusLowRank:
        rank, most = spec.get("rank"), min(linear.in_features, linear.out_features)
        if set(spec) != {"rank"} or type(rank) is not int or not 1 <= rank <= most:
            raise ModelError(f"{dict(spec)} is none of its specs; give it a rank from 1 to {most}")
        return DiagonalPlusLowRank(linear, rank).train(linear.training)


def _placed(diagonal: torch.Tensor, out: int, size: int) -> torch.Tensor:
    return torch.diag_embed(diagonal).new_zeros(out, size).diagonal_scatter(diagonal)


def _rest(problem: Problem) -> torch.Tensor:
    W = problem.W.double()
    return W - _placed(W.diagonal(), *W.shape)


register(ToyForm())
