"""The dense weight, as it is."""

import numpy as np
from torch import nn

from spectrim.errors import ModelError
from spectrim.linear import Linear
from spectrim.recipe import QuantizePart
from spectrim.storage.base import DENSE, Form, Options, Spec, Tensors, register
from spectrim.storage.problem import Problem


class Dense(Form):
    """A linear that is left alone: nothing is made, nothing is built."""

    name = DENSE
    marker = "weight"

    def options(self, problem: Problem) -> Options:
        """The one option, without error; none where all weights are to be integers."""
        if problem.fixed_bits:
            return Options.listed(self.name, [])
        return Options(self.name, np.array([problem.linear.nbytes]), np.zeros(1), lambda _: {})

    def make(self, problem: Problem, spec: Spec) -> Tensors:
        """The weight in its own dtype."""
        return {"weight": problem.W.to(problem.linear.dtype)}

    def build(self, linear: nn.Linear, spec: Spec) -> nn.Module:
        """The linear itself."""
        self.heads(spec)
        return linear

    def heads(self, spec: Spec) -> None:
        """None; ModelError for a spec with anything in it."""
        if spec:
            raise ModelError(f"a dense linear has no {next(iter(spec))!r}")

    def least(self, linear: Linear, quantize: QuantizePart) -> int:
        """Bytes of the weight."""
        return linear.nbytes

    def nbytes(self, linear: Linear, spec: Spec) -> int:
        """Bytes of the weight."""
        return linear.nbytes

    def params(self, linear: Linear, spec: Spec) -> int:
        """Numbers of the weight."""
        return linear.params


register(Dense())
