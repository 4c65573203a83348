"""Integer weights whose error is small in the metric of a recipe; pure tensors, no modules, no files.

The error of a weight W that is stored as Q is ``tr(G E C Eᵀ)``, E = W − Q, with metrics C of its inputs and G of its
outputs. With ``C = T Tᵀ`` and ``G = S Sᵀ``, both factors upper triangular, it is ``‖Sᵀ E T‖²``, and entry (i, j) of
that matrix depends on the entries (i', j') of E with i' ≤ i and j' ≤ j alone. Rounding in that order, each entry to the
grid point nearest to the value that would make its own entry of ``Sᵀ E T`` vanish, gives ``Σ S_ii² r_ij² T_jj²`` with
rounding residuals r. With G the identity this is GPTQ (Frantar et al., ICLR 2023), which is Babai's nearest plane; the
second factor carries the error on across the rows as well. Rounding to nearest is the case of two diagonal metrics.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from spectrim.errors import NumericalError
from spectrim.maths.roots import finite, times_metric
from spectrim.maths.rotation import turned, turned_back, turned_metric

DAMPING = 0.1  # dampening of the metrics, as a share of the mean of their diagonals
_SHAPE = 16  # bytes of the shape that compressed-tensors stores with every weight
_TILE = 32  # rows and columns that one wave runs over
_BATCH = 8  # tiles whose products with what is above and to the left are one, on a CPU; on a GPU all at once
_BLOCK = 128  # columns between two matrix products
_AT_ONCE = 1 << 17  # values that are rounded together: a small weight in several ranges, which spares calls
_SLAB = 1 << 22  # values of a weight that are rounded to nearest together
_RANGES = 16  # how many are tried for every group, between these shares of that of all its values:
_ALONE, _FED = (1.0, 0.5), (1.1, 0.6)  # with feedback, values grow by errors before they are rounded


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits with one scale per output and group of `group` inputs; None for one scale per output.

    A symmetric grid has its zero at code 0, an asymmetric one has a zero point for every scale. Codes are signed, from
    −2^(bits−1) to 2^(bits−1) − 1, as compressed-tensors has them. Those of a `rotated` grid stand for the weight on
    rotated inputs (see :mod:`spectrim.maths.rotation`).
    """

    bits: int
    group: int | None
    symmetric: bool = True
    rotated: bool = False

    @property
    def spec(self) -> dict[str, Any]:
        """JSON types, as plans and configs have them: ``rotated`` is not there unless it is true."""
        return {name: value for name, value in asdict(self).items() if name != "rotated" or value}

    @property
    def low(self) -> int:
        """The smallest code."""
        return -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        """The largest code."""
        return (1 << self.bits - 1) - 1

    def nearest(self, x: torch.Tensor, step: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The codes nearest to x in steps of `step` from the zero point `offset`, in the dtype of x."""
        return ((x / step).round() + offset).clamp(self.low, self.high)

    def nbytes(self, out: int, size: int, itemsize: int) -> int:
        """Stored bytes of a weight [out, size] with scales of `itemsize` bytes; words are whole, the shape counts."""
        groups = 1 if self.group is None else size // self.group
        words = -(-size * self.bits // 32) * out
        zeros = 0 if self.symmetric else -(-out * self.bits // 32) * groups
        return 4 * (words + zeros) + out * groups * itemsize + _SHAPE


@dataclass(frozen=True)
class Quantized:
    """Codes int8 [out, in], scales [out, groups] in the dtype that they are stored in, and zero points int8 or None."""

    grid: Grid
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """The weight [out, in] on inputs as they are that the codes stand for, float64."""
        step, zero = _spread(self.scale, self.zero, self.codes.shape[1])
        found = (self.codes.double() - zero) * step
        return turned_back(found) if self.grid.rotated else found


def fitting_group(size: int, group: int | None) -> int | None:
    """`group` if it divides `size` inputs, else None: one scale per output beats smaller groups at equal bytes."""
    return group if group is not None and size % group == 0 else None


def quantize(
    W: torch.Tensor,
    grid: Grid,
    C: torch.Tensor | None = None,
    G: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    damping: tuple[float, float] = (DAMPING, DAMPING),
    signed: bool = True,
) -> Quantized:
    """W rounded to `grid`, with error feedback along the inputs, the outputs, or both (docs/methods.md, section 8).

    Args:
        W: [out, in], any floating dtype.
        grid: its group divides `in`, as do blocks of a rotation; W and C are those of inputs before it.
        C: metric of the inputs: None for the identity, [in] for a diagonal, or [in, in].
        G: metric of the outputs, the same by `out`. With neither metric a matrix, entries are rounded to nearest.
        dtype: of the scales, which are rounded to it before any code is chosen.
        damping: dampening of C and of G; share of the mean of a metric's diagonal that is added to the diagonal.
        signed: a symmetric grid's scales may be negative (see :func:`scales`).

    Raises:
        NumericalError: a metric is not positive semidefinite, or holds NaN or infinity, or a scale is too large for
            `dtype`.
    """
    if grid.rotated:
        W, C = turned(W.double()), on_grid(C, grid)
    rows, _, S = _triangular(G, len(W), damping[1], W)
    columns, weights, T = _triangular(C, W.shape[1], damping[0], W)
    if S is None and T is None:
        return _to_nearest(W, grid, weights, dtype, signed)
    W = W.double()
    fed = any(side is not None and bool(side.any()) for side in (S, T))
    scale, zero = _finite_scales(W, grid, weights, dtype, signed=signed, fed=fed)
    step, offset = (part[rows][:, columns] for part in _spread(scale, zero, W.shape[1]))

    X = W[rows][:, columns]
    if S is None:
        assert T is not None
        codes = _by_columns(X, step, offset, T, grid)
    elif T is None:
        codes = _by_columns(X.T, step.T, offset.T, S, grid).T
    else:
        codes = _by_waves(X, step, offset, S, T, grid)
    placed = torch.empty_like(codes, dtype=torch.int8)
    placed[rows[:, None], columns] = codes.to(torch.int8)
    return Quantized(grid, placed, scale, zero)


def slabs(W: torch.Tensor) -> Sequence[torch.Tensor]:
    """Parts of the rows of W whose copies in float64 take little: an embedding is larger than any other weight."""
    return W.split(max(1, _SLAB // W.shape[1]))


def on_grid(C: torch.Tensor | None, grid: Grid) -> torch.Tensor | None:
    """The metric of the inputs that a grid's codes multiply; of those on a rotated grid it is no diagonal."""
    if not grid.rotated or C is None:
        return C
    return turned_metric(C.diag() if C.ndim == 1 else C)


def conditional(M: torch.Tensor | None, size: int, like: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """The weights of squared rounding residuals under the metric of one side, [size] float64 on the device of `like`.

    These are the squared diagonal of its triangular factor, or the metric itself where that is diagonal.
    """
    return _triangular(M, size, damping, like)[1]


def expected(
    W: torch.Tensor,
    grid: Grid,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    dtype: torch.dtype = torch.float64,
    *,
    signed: bool = True,
    fed: bool = True,
) -> torch.Tensor:
    """Predicted share of each entry of W in the error of :func:`quantize`, [out, in], from rounding to nearest.

    `inputs` [in] and `outputs` [out] are the weights of squared residuals (see :func:`conditional`), `inputs` those of
    the metric of `on_grid`.
    """
    W = turned(W) if grid.rotated else W
    scale, zero = scales(W, grid, inputs, dtype, signed=signed, fed=fed)
    step, offset = _spread(scale.nan_to_num(), zero, W.shape[1])
    codes = grid.nearest(W.double(), step, offset)
    return ((codes - offset) * step - W).square() * inputs * outputs[:, None]


def error(E: torch.Tensor, C: torch.Tensor | None = None, G: torch.Tensor | None = None) -> float:
    """``tr(G E C Eᵀ)`` of E [out, in] for metrics as :func:`quantize` takes them."""
    E = E.double()
    return float((times_metric(E.T, G).T * times_metric(E, C)).sum())


def scales(
    W: torch.Tensor,
    grid: Grid,
    weights: torch.Tensor,
    dtype: torch.dtype = torch.float64,
    *,
    signed: bool = True,
    fed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales [out, groups] in `dtype`, and zero points int8 of an asymmetric grid, of least squared rounding error.

    Ranges from that of all values of a group down to half of it are tried; `weights` [in] weigh the inputs. What error
    feedback (`fed`) adds to the values needs wider ones, since an entry that is clipped passes on all that it lacks. A
    symmetric grid reaches one code farther below zero than above, so that with `signed` both signs of each scale are
    tried. A group of zeros has scale one, and one whose scale is too large for `dtype` an infinite one.
    """
    out, size = W.shape
    X = W.reshape(out, -1, grid.group or size)  # [out, groups, group]
    weights = weights.reshape(1, X.shape[1], -1)
    weights = (weights / weights.amax(-1, keepdim=True).clamp_min(1e-300)).float()
    levels = grid.high - grid.low
    low, high = (end.double() for end in (X.amin(-1, keepdim=True).clamp_max(0), X.amax(-1, keepdim=True).clamp_min(0)))
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    unit = torch.where(high > low, high - low, torch.ones_like(low))
    X = (X / unit).float()  # only costs are computed in it, and only within a group
    best = torch.full_like(low, torch.inf, dtype=torch.float32)
    steps, zeros = torch.full_like(low, torch.inf), torch.zeros_like(low)
    signs = (1, -1) if signed and grid.symmetric else (1,)
    tried = torch.tensor([*itertools.product(torch.linspace(*(_FED if fed else _ALONE), _RANGES).tolist(), signs)])
    tried = tried.to(low)[..., None, None, None]  # [n, 2, 1, 1, 1]
    for shrink, sign in (some.unbind(1) for some in tried.split(max(1, _AT_ONCE // X.numel()))):
        step = ((high - low) * shrink / levels).to(dtype).double()  # [n, out, groups, 1], and so all below
        step = torch.where(step > 0, step, torch.ones_like(step)) * sign
        zero = zeros.expand_as(step)
        if not grid.symmetric:  # zeros need no zero point, whose product would be taken off again
            zero = (grid.low - low * shrink / step).round().clamp(grid.low, grid.high).where(high > low, zero)
        narrow, origin = (step / unit).clamp(-1e30, 1e30).float(), zero.float()  # a group of zeros has step 1
        residual = (X / narrow).round_().add_(origin).clamp_(grid.low, grid.high).sub_(origin).mul_(narrow).sub_(X)
        cost = (residual.square_() * weights).sum(-1, keepdim=True).where(step.isfinite(), torch.inf)
        cost, first = cost.min(0, keepdim=True)
        better = (cost < best)[0]
        best = torch.where(better, cost[0], best)
        steps, zeros = (
            torch.where(better, found.gather(0, first)[0], kept) for found, kept in ((step, steps), (zero, zeros))
        )
    return steps[..., 0].to(dtype), None if grid.symmetric else zeros[..., 0].to(torch.int8)


def _finite_scales(
    W: torch.Tensor, grid: Grid, weights: torch.Tensor, dtype: torch.dtype, *, signed: bool, fed: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `scales`. Raises NumericalError for one that is too large for `dtype`."""
    scale, zero = scales(W, grid, weights, dtype, signed=signed, fed=fed)
    if not bool(scale.isfinite().all()):
        raise NumericalError(f"its integers need scales beyond {dtype}; load the model in bfloat16 or float32")
    return scale, zero


def _to_nearest(W: torch.Tensor, grid: Grid, weights: torch.Tensor, dtype: torch.dtype, signed: bool) -> Quantized:
    """W [out, in] rounded without feedback, some rows at a time: each depends on itself alone."""
    codes, steps, zeros = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    for X in map(torch.Tensor.double, slabs(W)):
        scale, zero = _finite_scales(X, grid, weights, dtype, signed=signed, fed=False)
        codes.append(grid.nearest(X, *_spread(scale, zero, X.shape[1])).to(torch.int8))
        steps.append(scale)
        zeros += [] if zero is None else [zero]
    return Quantized(grid, torch.cat(codes), torch.cat(steps), torch.cat(zeros) if zeros else None)


def _spread(scale: torch.Tensor, zero: torch.Tensor | None, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of every entry, [out, in] float64."""
    group = size // scale.shape[1]
    step = scale.double().repeat_interleave(group, dim=1)
    return step, torch.zeros_like(step) if zero is None else zero.double().repeat_interleave(group, dim=1)


def _triangular(
    M: torch.Tensor | None, size: int, damping: float, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The order in which the inputs (or outputs) are rounded, the weights of squared residuals, and a feedback matrix.

    The order [size] begins with the largest diagonal entry of the metric, because the error of an early entry can be
    compensated by all entries after it, and that of the last entry by none. The weights [size] are in the original
    order. The feedback matrix [size, size], in the new order, is the strictly upper part of the unit triangular
    factor; None for a diagonal metric.
    """
    if M is None or M.ndim == 1:
        weights = like.new_ones(size, dtype=torch.float64) if M is None else M.double()
        return torch.arange(size, device=like.device), weights, None
    order = M.diagonal().argsort(descending=True)
    last = order.flip(0)
    M = M[last[:, None], last].double()  # a metric may be gigabytes: no more copies than there must be
    M.diagonal().add_(damping * M.diagonal().mean().clamp_min(1e-300))
    lower, failed = torch.linalg.cholesky_ex(M)
    del M
    if int(failed) or not finite(lower):
        raise NumericalError("a metric is not positive definite; raise quantize.damping, or check the moments")
    weights = torch.empty_like(lower.diagonal())
    weights[last] = lower.diagonal().square()
    upper = lower.div_(lower.diagonal().clone()).flip(0, 1)  # M = upper diag(weights) upperᵀ
    return order, weights, upper.triu_(1)


def _by_columns(W: torch.Tensor, step: torch.Tensor, offset: torch.Tensor, T: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes [out, in], column by column; the error of a column is compensated in later ones by T [in, in]."""
    W, step, offset = (part.T.contiguous() for part in (W, step, offset))
    codes, E = torch.empty_like(W), torch.empty_like(W)  # [in, out]
    for start in range(0, len(W), _BLOCK):
        block = slice(start, start + _BLOCK)
        carried = T[:start, block].T @ E[:start]
        errors, inside = E[block], T[block, block].T.contiguous()
        for j in range(len(errors)):
            at = start + j
            target = W[at] + carried[j]
            if j:
                target += inside[j, :j] @ errors[:j]
            codes[at] = grid.nearest(target, step[at], offset[at])
            errors[j] = W[at] - (codes[at] - offset[at]) * step[at]
    return codes.T


def _by_waves(
    W: torch.Tensor, step: torch.Tensor, offset: torch.Tensor, S: torch.Tensor, T: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Codes [out, in] with error feedback along the inputs by T [in, in] and along the outputs by S [out, out].

    Entry (i, j) rounds ``W_ij + c_ij + h_ij`` with ``c = E T`` of the entries to the left and ``h = Sᵀ (E + c)`` of
    those above. All entries of one anti-diagonal are independent, and so are all tiles of one.
    """
    out, size = W.shape
    tall, wide = -(-out // _TILE), -(-size // _TILE)
    down, right = tall * _TILE - out, wide * _TILE - size

    def tiled(M: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """[tall, wide, n, n]; from here on all columns run from right to left."""
        M = torch.nn.functional.pad(M, (0, right, 0, down), value=value).flip(1)
        return M.unflatten(1, (wide, _TILE)).unflatten(0, (tall, _TILE)).transpose(1, 2)

    W, step, offset = tiled(W), tiled(step, 1.0), tiled(offset)
    S = torch.nn.functional.pad(S, (0, down, 0, down)).unflatten(1, (tall, _TILE))  # [i', a, i]
    T = torch.nn.functional.pad(T, (0, right, 0, right)).flip(0, 1).T.unflatten(0, (wide, _TILE))  # [b, j, j']
    S_inside = torch.stack([S[a * _TILE : (a + 1) * _TILE, a] for a in range(tall)])
    T_inside = torch.stack([T[b, :, b * _TILE : (b + 1) * _TILE] for b in range(wide)])
    # E by rows and F = E + c by columns of tiles. What is not rounded yet is zero in them, so that some tiles of an
    # anti-diagonal are one batched product, although each looks back on a stretch of its own.
    E, F = W.new_zeros(tall, _TILE, wide * _TILE), W.new_zeros(tall * _TILE, wide, _TILE)
    codes = torch.empty_like(W)
    batch = min(tall, wide) if W.is_cuda else _BATCH
    for shift in range(wide - 1, -tall, -1):  # columns of tiles less rows of tiles
        a = slice(max(0, -shift), min(tall, wide - shift))
        b = slice(a.start + shift, a.stop + shift)
        left, above = [], []
        for start in range(a.start, a.stop, batch):
            rows = slice(start, min(start + batch, a.stop))
            columns = slice(rows.start + shift, rows.stop + shift)
            seen, done = slice((rows.stop - 1) * _TILE), slice((columns.start + 1) * _TILE, None)
            left.append(_products(E[rows, :, done], T[columns, :, done].mT))
            above.append(_products(S[seen, rows].permute(1, 2, 0), F[seen, columns].transpose(0, 1)))
        here = [M.diagonal(shift).movedim(2, 0) for M in (W, step, offset)]
        waves = _wave(here, torch.cat(left), torch.cat(above), S_inside[a], T_inside[b], grid)
        code, residual, both = (part.movedim(0, 2) for part in waves)
        codes.diagonal(shift).copy_(code)
        E.unflatten(2, (wide, _TILE)).diagonal(shift, 0, 2).copy_(residual)
        F.unflatten(0, (tall, _TILE)).diagonal(shift, 0, 2).copy_(both)
    return codes.transpose(1, 2).flatten(2, 3).flatten(0, 1).flip(1)[:out, :size]


def _products(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """``A_i B_i`` of A [tiles, n, k] and B [tiles, k, n]."""
    if A.is_cuda:
        return A @ B
    return torch.stack([a @ b for a, b in zip(A, B, strict=True)])  # MKL takes 2.5 times as long for a batch


def _wave(
    parts: list[torch.Tensor], left: torch.Tensor, above: torch.Tensor, S: torch.Tensor, T: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, E and F of independent tiles [tiles, n, n], whose columns run from right to left, as do all arguments'.

    `parts` are W, steps and offsets, `left` and `above` the errors that are fed from there. S [tiles, i', i] and
    T [tiles, j, j'] are the parts of the factors inside the tiles.
    """
    n = S.shape[1]
    codes, E, F = (torch.zeros_like(left) for _ in range(3))
    for t in range(2 * n - 1):
        at = n - 1 - t  # an anti-diagonal of the tile is a diagonal here
        i = slice(max(0, -at), min(n, t + 1))
        j = slice(i.start + at, i.stop + at)
        x, step, offset, carried, fed = (value.diagonal(at, 1, 2) for value in (*parts, left, above))
        carried = carried + (E[:, i] * T[:, j]).sum(2)
        code = grid.nearest(x + carried + fed + (F[:, :, j] * S[:, :, i]).sum(1), step, offset)
        residual = x - (code - offset) * step
        for whole, value in zip((codes, E, F), (code, residual, residual + carried), strict=True):
            whole.diagonal(at, 1, 2).copy_(value)
    return codes, E, F
