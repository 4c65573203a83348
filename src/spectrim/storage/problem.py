"""What a form of storage makes options and tensors of: a weight, and the metrics in which its error counts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.nn.utils import skip_init

from spectrim.linear import Linear
from spectrim.maths.decompose import Directions, OutputMetric, decompose
from spectrim.maths.removal import DAMPING, Removal, removal
from spectrim.maths.rotation import BLOCK
from spectrim.maths.rounding import Grid, conditional, expected, fitting_group, on_grid
from spectrim.recipe import QuantizePart, StoragePart

# Whether inputs are rotated is decided by so many rows in so many bits; it takes time whenever the layer runs, so that
# the error has to fall by a twentieth.
_TRIED, _TRIED_BITS, _WORTH = 256, 3, 0.95
_RIDGE = 0.01  # of refitted columns, for each input by position


@dataclass(frozen=True)
class Problem:
    """One weight, and the metrics in which its error counts: what a form makes options and tensors of.

    Args:
        linear: whose weight it is.
        weight: gives it, [out, in] of any floating dtype.
        metrics: give those of its inputs and outputs (see ``C`` and ``output``); asked once, and by few forms.
        storage, quantize: what the recipe says of factors and of integers.
        heads: parts of the outputs that are factored apart.
        kept: the spectrum in these metrics, where one has been made.
        units: which units of an MLP can go, where others that compute or read them have to agree; gives that, in
            metrics of its own.
        positions: how many stand behind the metric of the inputs, and that of the outputs; 0 where there are no
            samples.
    """

    linear: Linear
    weight: Callable[[], torch.Tensor]
    metrics: Callable[[], tuple[torch.Tensor | None, OutputMetric | None]]
    storage: StoragePart
    quantize: QuantizePart
    heads: int = 1
    kept: Directions | None = None
    units: Callable[[], Removal] | None = None
    positions: tuple[float, float] = (0, 0)

    @cached_property
    def W(self) -> torch.Tensor:  # noqa: N802
        """The weight [out, in] in the dtype that it has."""
        return self.weight()

    @cached_property
    def _metrics(self) -> tuple[torch.Tensor | None, OutputMetric | None]:
        return self.metrics()

    @property
    def C(self) -> torch.Tensor | None:  # noqa: N802
        """Metric of the inputs, float64: None for the identity, [in] for a diagonal, or [in, in]."""
        return self._metrics[0]

    @property
    def output(self) -> OutputMetric | None:
        """Metric of the outputs, head by head where they are factored so; None for the identity."""
        return self._metrics[1]

    @cached_property
    def G(self) -> torch.Tensor | None:  # noqa: N802
        """The same as a matrix [out, out] float64 in nats; None for the identity."""
        return None if self.output is None else self.output.dense(len(self.W), self.W.device)

    @cached_property
    def spectrum(self) -> Directions:
        """All directions of W in these metrics."""
        return decompose(self.W, self.C, self.output, self.heads) if self.kept is None else self.kept

    @cached_property
    def left(self) -> np.ndarray:
        """The error with 0, 1, … directions, float64 [m + 1]: nats with an output metric, ``‖(W − Ŵ) R‖²`` without."""
        each = self.spectrum.s if self.spectrum.loss is None else self.spectrum.loss
        return np.append(each.flip(0).cumsum(0).flip(0).cpu().numpy(), 0.0)

    @cached_property
    def removal(self) -> Removal:
        """The order in which its units go: as is given, or its inputs in these metrics."""
        return removal(self.W, self.C, self.G, self.ridge) if self.units is None else self.units()

    @property
    def ridge(self) -> float:
        """Dampening of the input metric where columns are fitted again.

        From fewer positions than inputs some of them can be had from the others exactly, which is chance.
        """
        size, positions = self.linear.in_features, self.positions[0]
        return max(DAMPING, min(1.0, _RIDGE * size / positions)) if positions else DAMPING

    def input_weights(self, grid: Grid) -> torch.Tensor:
        """How much a squared rounding residual on a grid counts, by input that its codes multiply, [in] float64.

        Where errors are fed on that is far less than the diagonal of the metric says (see `conditional`).
        """
        if grid.rotated not in self._by_input:
            self._by_input[grid.rotated] = self._weights(on_grid(self.C, grid), self.W.shape[1], self.positions[0])
        return self._by_input[grid.rotated]

    @cached_property
    def _by_input(self) -> dict[bool, torch.Tensor]:
        return {}

    @cached_property
    def output_weights(self) -> torch.Tensor:
        """The same by output, [out]."""
        return self._weights(self.G, len(self.W), self.positions[1])

    def _weights(self, M: torch.Tensor | None, size: int, positions: float) -> torch.Tensor:
        damping, like = self.quantize.dampening(size, positions), self.W.new_empty(0, dtype=torch.float64)
        if M is None or M.ndim == 1 or damping is not None:
            return conditional(M, size, like, damping or 0.0)
        return M.diagonal().to(like)

    def dampening(self, size: int, out: int) -> tuple[float, float] | None:
        """Of metrics of `size` inputs and `out` outputs in the error feedback; None with rounding to nearest."""
        pairs = zip((size, out), self.positions, strict=True)
        inputs, outputs = (self.quantize.dampening(*pair) for pair in pairs)
        return None if inputs is None or outputs is None else (inputs, outputs)

    @cached_property
    def rotates(self) -> bool:
        """Whether integers are to be those of a rotated grid: the predicted error of some rows falls clearly."""
        linear, quantize = self.linear, self.quantize
        alike = linear.expert is not None and self.storage.experts == "same"  # of one form, whatever is best for each
        if not quantize.rotate or quantize.plain or alike or linear.in_features % BLOCK:
            return False
        if self.C is not None and self.C.ndim == 1:
            return False
        rows = torch.linspace(0, len(self.W) - 1, min(len(self.W), _TRIED), device=self.W.device).long()
        bits = quantize.bits if isinstance(quantize.bits, int) else _TRIED_BITS
        grids = (self.grid(bits, linear.in_features, rotated=rotated) for rotated in (False, True))
        plain, rotated = (self.noise(self.W[rows], grid, outputs=self.output_weights[rows]).sum() for grid in grids)
        return bool(rotated < _WORTH * plain)

    def grid(self, bits: int, size: int, *, rotated: bool | None = None) -> Grid:
        """The recipe's grid of so many bits for a weight of `size` inputs; `rotated` None as is best for the linear."""
        rotated = self.rotates and size % BLOCK == 0 if rotated is None else rotated
        return Grid(bits, fitting_group(size, self.quantize.group), self.quantize.symmetric, rotated)

    def noise(
        self,
        W: torch.Tensor,
        grid: Grid,
        inputs: torch.Tensor | None = None,
        outputs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the rounding of each entry of W [out, in] adds to the error, predicted without feedback; float64.

        On a rotated grid entries are those of the weight on rotated inputs. `inputs` [in] and `outputs` [out] weigh
        squared residuals; those of the metrics where they are None.
        """
        inputs = self.input_weights(grid) if inputs is None else inputs
        outputs = self.output_weights if outputs is None else outputs
        matrix = self.output is not None or (self.C is not None and self.C.ndim > 1)
        fed, signed = matrix and self.quantize.fed, self.quantize.signed
        return expected(W.double(), grid, inputs, outputs, self.linear.dtype, signed=signed, fed=fed)

    @property
    def may_be_integers(self) -> bool:
        """Whether the recipe allows integers for this linear."""
        return self.quantize.takes(self.linear.role)

    @property
    def fixed_bits(self) -> bool:
        """Whether all that is stored of this linear is to be integers."""
        return self.may_be_integers and self.quantize.bits != "auto"

    def empty(self) -> nn.Linear:
        """A linear of the same shape, dtype and device, without bias and values."""
        shape = self.linear.in_features, self.linear.out_features
        return skip_init(nn.Linear, *shape, bias=False, device=self.W.device, dtype=self.linear.dtype)
