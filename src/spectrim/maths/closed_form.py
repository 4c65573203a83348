"""The anchored closed form from moments (docs/methods.md, section 7): pure tensors, no modules."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from spectrim.errors import NumericalError
from spectrim.maths.roots import check_finite, solved, times_metric, wide
from spectrim.maths.sums import Gram

_ROUNDING = 1e-5  # relative error of products of float32, amply


@dataclass
class ShiftedSum:
    """Sums over positions for linears that read one input x' in the compressed model; ``t`` are their targets.

    Like calibration moments, they are float32 products per batch into float64 sums.
    """

    second: Gram  # Σ x' x'ᵀ  [in, in]
    cross: dict[str, torch.Tensor] = field(default_factory=dict)  # by linear: Σ t x'ᵀ  [out, in]
    count: int = 0  # positions

    @classmethod
    def zero(cls, width: int) -> "ShiftedSum":
        """Zero sums."""
        return cls(Gram(width))

    def add(self, x: torch.Tensor, targets: dict[str, torch.Tensor]) -> None:
        """Add inputs x' [positions, in] and, by linear, their targets [positions, out].

        Raises:
            NumericalError: NaN or infinity; names the linear.
        """
        x = check_finite(f"the compressed input of {next(iter(targets))}", wide(x))
        self.second.add(x, x.device)
        for name, target in targets.items():
            product = check_finite(f"the target of {name}", wide(target).T @ x)
            if name not in self.cross:
                self.cross[name] = torch.zeros_like(product, dtype=torch.float64)
            self.cross[name] += product
        self.count += len(x)

    def taken(self) -> torch.Tensor:
        """E[x' x'ᵀ] [in, in] float64; the sum, which may be gigabytes, is let go of."""
        mean = self.second.dense().div_(self.count)
        self.second = Gram(len(mean))
        return mean


def blended(
    W: torch.Tensor, second: torch.Tensor, cross: torch.Tensor, dense: torch.Tensor, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of moments of the compressed model's inputs and of the dense model's.

    With a share ω of targets t on inputs x' and a share 1 − ω of targets W x on inputs x, the error of a matrix Ŵ,
    ``ω E‖t − Ŵ x'‖² + (1 − ω) E‖W x − Ŵ x‖²``, is that of one regression with the moments ``H = ω C' + (1 − ω) C`` and
    ``ω T + (1 − ω) W C``. ω = 0 is the layer by itself, ω = 1 the compressed prefix alone.

    Args:
        W: [out, in], any floating dtype.
        second: C' = E[x' x'ᵀ], [in, in] float64.
        cross: T = E[t x'ᵀ], [out, in] float64.
        dense: C = E[x xᵀ], [in, in] float64.
        weight: ω in [0, 1].
    """
    return dense.lerp(second, weight), (W.double() @ dense).lerp(cross, weight)


def anchored_weight(W: torch.Tensor, second: torch.Tensor, cross: torch.Tensor, damping: float) -> torch.Tensor:
    """The weight that maps the inputs x' to the targets t: ``W + (T − W C')(C' + δ tr(C')/in I)⁻¹``.

    With ``C' = E[x' x'ᵀ]`` and ``T = E[t x'ᵀ]`` this is the ridge regression of t on x', drawn towards W instead of
    towards zero, so that directions that no sample shows keep the dense weight. For t = W x and δ → 0 it is
    ``W E[x x'ᵀ] E[x' x'ᵀ]⁺`` (docs/methods.md, section 7); for x' = x it is W, whatever δ.

    Args:
        W: [out, in], any floating dtype.
        second: C' [in, in] float64.
        cross: T [out, in] float64.
        damping: dampening δ > 0.

    Returns:
        [out, in] float64.

    Raises:
        NumericalError: C' is too ill-conditioned for δ.
    """
    W = W.double()
    return W + _ridge(cross - W @ second, second.clone(), damping)


def _ridge(residual: torch.Tensor, H: torch.Tensor, damping: float) -> torch.Tensor:
    """``residual (H + δ tr(H)/in I)⁻¹`` [out, in]; zero for a zero H, which is written to: it may be gigabytes."""
    ridge = damping * H.trace() / len(H)
    if not float(ridge):  # no input at all
        return torch.zeros_like(residual)
    H.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(H)
    if int(failed):
        raise NumericalError("the inputs are too ill-conditioned; raise compensate.damping")
    return solved(residual, factor)


def correction(
    W: torch.Tensor, second: torch.Tensor, cross: torch.Tensor, dense: torch.Tensor, damping: float
) -> torch.Tensor:
    """``D = (T − W C')(H + δ tr(H)/in I)⁻¹``, [out, in] float64, with H half way between C' and C.

    W + ω D is near the anchored weight of every share ω, whose H follows ω. Arguments as of `blended` and
    `anchored_weight`.

    Raises:
        NumericalError: H is too ill-conditioned for δ.
    """
    half = 0.5
    H, target = blended(W, second, cross, dense, half)
    return _ridge(target - W.double() @ H, H, damping) / half


@dataclass
class LeftOut:
    """The error of W + ω D over positions that D was not fitted to, ``Σ ‖t − (W + ω D) x'‖²``, as a parabola in ω."""

    W: torch.Tensor  # [out, in]
    step: torch.Tensor  # D [out, in]
    slope: float = 0.0  # Σ (t − W x') · D x'
    square: float = 0.0  # Σ ‖D x'‖²
    total: float = 0.0  # Σ ‖t‖²
    count: int = 0  # positions

    def add(self, x: torch.Tensor, target: torch.Tensor) -> None:
        """Add inputs x' [positions, in] and targets t [positions, out]. Raises NumericalError: NaN or infinity."""
        x, target = wide(x), wide(target)
        change, error = x @ self.step.to(x.dtype).T, target - x @ self.W.to(x.dtype).T
        self.slope += float(check_finite("the error of left-out samples", error * change).sum(dtype=torch.float64))
        self.square += float(change.square().sum(dtype=torch.float64))
        self.total += float(target.square().sum(dtype=torch.float64))
        self.count += len(x)


def best_weight(judges: Sequence[tuple[float, LeftOut]]) -> float:
    """The ω in [0, 1] of least error, of weighted means over positions.

    It is 0 where nothing was left out, and where D changes outputs by no more than rounding does: before the first
    compressed layer nothing is to be corrected.
    """
    seen = [(weight / judge.count, judge) for weight, judge in judges if judge.count]
    square = sum(share * judge.square for share, judge in seen)
    if square <= _ROUNDING**2 * sum(share * judge.total for share, judge in seen):
        return 0.0
    return min(max(sum(share * judge.slope for share, judge in seen) / square, 0.0), 1.0)


def gram(B: torch.Tensor, C: torch.Tensor | None) -> torch.Tensor:
    """``B C Bᵀ`` [k, k] of B [k, in]: the metric of the inputs of the other factor."""
    return times_metric(B, C) @ B.T


def refit(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor | None = None) -> torch.Tensor:
    """The A [out, k] of least ``‖L (W − A B) R‖`` for a given B [k, in], whatever L is (adaComp, AdaSVD, section 3.2).

    ``A + (W − A B) C Bᵀ (B C Bᵀ)⁺``: in directions that the metric C of the inputs does not see, A stays what it is.
    """
    return A + times_metric(W - A @ B, C) @ B.T @ torch.linalg.pinv(gram(B, C), hermitian=True, rtol=1e-9)
