"""A form of storage that is not spectrim's: some columns of the weight, and which ones they are."""

from dataclasses import dataclass

import torch
from torch import nn

from spectrim.errors import ModelError
from spectrim.linear import Linear
from spectrim.maths.rounding import error
from spectrim.recipe import QuantizePart
from spectrim.storage import Form, Options, Problem, Spec, StoredLayer, Tensors


class ColumnLinear(StoredLayer):
    """``y = kept x[places] + bias`` with ``kept`` [out, count] and ``places`` int32 [count]."""

    form = "columns"

    def __init__(self, linear: nn.Linear, count: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.kept = nn.Parameter(torch.full((linear.out_features, count), torch.nan, **like))
        self.register_buffer("places", torch.arange(count, dtype=torch.int32, device=linear.weight.device))

    @property
    def spec(self) -> dict[str, int]:
        return {"count": len(self.places)}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input[..., self.places], self.kept, self.bias)

    def product(self) -> torch.Tensor:
        self.check_values()
        W = self.kept.new_zeros(self.out_features, self.in_features)
        return W.index_copy(1, self.places.long(), self.kept)

    def loaded(self) -> None:
        if not self.places.is_meta and not bool((self.places < self.in_features).all()):
            raise ModelError("places: there are columns that the linear lacks")


@dataclass
class Columns(Form):
    """``count`` columns, those of the largest sums of squares."""

    name: str = "columns"
    marker: str = "kept"

    def options(self, problem: Problem) -> Options:
        if problem.heads > 1 or problem.fixed_bits:
            return Options.listed(self.name, [])
        size = problem.linear.in_features
        order = self._order(problem)
        rows = []
        for count in range(1, size):
            E = problem.W.double().index_fill(1, order[:count], 0)
            spec = {"count": count}
            rows.append((self.nbytes(problem.linear, spec), error(E, problem.C, problem.G), spec))
        return Options.listed(self.name, [row for row in rows if row[0] < problem.linear.nbytes])

    def make(self, problem: Problem, spec: Spec) -> Tensors:
        layer = self.build(problem.empty(), spec)
        places = self._order(problem)[: spec["count"]].sort().values
        with torch.no_grad():
            layer.kept.copy_(problem.W[:, places])
            layer.places.copy_(places)
        return layer.state_dict()

    def build(self, linear: nn.Linear, spec: Spec) -> ColumnLinear:
        count = spec.get("count")
        if spec.keys() != {"count"} or type(count) is not int or not 0 < count <= linear.in_features:
            raise ModelError(f"{dict(spec)} is no count of columns up to {linear.in_features}")
        layer = ColumnLinear(linear, count)
        layer.kept.requires_grad_(linear.weight.requires_grad)
        return layer.train(linear.training)

    def least(self, linear: Linear, quantize: QuantizePart) -> int:
        return 0 if quantize.bits not in (None, "auto") else self.nbytes(linear, {"count": 1})

    @staticmethod
    def _order(problem: Problem) -> torch.Tensor:
        return problem.W.double().square().sum(0).argsort(descending=True)
