"""Other grids of 2 and 3 bits on the same linears: rounding errors in the metric, beside today's at equal bytes.

    python benchmarks/grids.py MODEL --stats STATS --linears layers.5.self_attn.q_proj,layers.5.mlp.down_proj

Every grid is rounded with feedback on both sides. `rotated` turns the inputs by a random Hadamard matrix (of the
power of two in their number; any rotation of what is left), `half` has its levels at odd halves of a step, `zero
points` is asymmetric, `E8` rounds 8 inputs at once to points of that lattice, of which 2^(8·bits) lie in a ball, and
`trellis` runs a code of 256 states down each column, the feedback of every survivor its own. The last two turn inputs
and outputs first. Errors are divided by those of today's grid (groups of 128 where they divide the inputs, signed
scales), on the straight lines between its points at 2, 3 and 4 bits: what the allocation gets there by mixing them.
"""

import itertools
from collections.abc import Iterator
from math import log2

import numpy as np
import torch

from rounding import named, of_linears
from spectrim.maths import rounding
from spectrim.maths.rotation import hadamard
from spectrim.maths.rounding import DAMPING, Grid, _by_waves, _spread, _triangular, error, fitting_group, quantize

RANGES = ((1.6, 1.1), (1.1, 0.6), (0.7, 0.2))  # of which the best one counts, for every grid
STATES = 256


class Half(Grid):
    """Levels −(2^bits − 1)/2 … (2^bits − 1)/2, the zero point of a half."""

    @property
    def low(self) -> int:
        """The smallest code."""
        return 1 - (1 << self.bits - 1)

    @property
    def high(self) -> int:
        """The largest code."""
        return 1 << self.bits - 1

    def nearest(self, x: torch.Tensor, step: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The codes nearest to x, of any offset."""
        return (x / step + offset).round().clamp(self.low, self.high)


def half_steps(W: torch.Tensor, grid: Half, C: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """W on a half-step grid."""
    rows, _, S = _triangular(G, len(W), DAMPING, W)
    columns, weights, T = _triangular(C, W.shape[1], DAMPING, W)
    assert S is not None
    assert T is not None
    X = W.unflatten(1, (-1, grid.group or W.shape[1]))
    by_group = weights.view(X.shape[1:])
    found = []
    for most, least in RANGES:
        best = torch.full(X.shape[:2], torch.inf, dtype=W.dtype)
        scale = torch.ones_like(best)
        for shrink in torch.linspace(most, least, 16).tolist():
            step = (X.abs().amax(-1) * shrink / (2**grid.bits - 1) * 2).bfloat16().double().clamp_min(1e-300)
            codes = grid.nearest(X, step[..., None], torch.tensor(0.5))
            cost = (((codes - 0.5) * step[..., None] - X).square() * by_group).sum(-1)
            scale, best = torch.where(cost < best, step, scale), torch.minimum(cost, best)
        step = _spread(scale, None, W.shape[1])[0][rows][:, columns]
        Q = torch.empty_like(W)
        offset = torch.full_like(W, 0.5)
        Q[rows[:, None], columns] = (_by_waves(W[rows][:, columns], step, offset, S, T, grid) - 0.5) * step
        found.append(Q)
    return min(found, key=lambda Q: error(W - Q, C, G))


def turned(size: int, seed: int = 0) -> torch.Tensor:
    """A random orthogonal matrix [size, size]: Hadamard of the power of two, any rotation of the odd rest."""
    generator = torch.Generator().manual_seed(seed)
    power = size & -size
    odd = torch.linalg.qr(torch.randn(size // power, size // power, dtype=torch.float64, generator=generator))[0]
    signs = torch.randint(2, (size,), generator=generator) * 2.0 - 1
    return torch.kron(odd.contiguous(), hadamard(power)) * signs


def unit_factor(M: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """M, dampened, as ``T D Tᵀ`` with T upper triangular with unit diagonal, by blocks; D's diagonal besides."""
    M = M + DAMPING * M.diagonal().mean() * np.eye(len(M))
    U = np.linalg.cholesky(M[::-1, ::-1])[::-1, ::-1]  # M = U Uᵀ
    T = U.copy()
    for at in range(0, len(M), block):
        part = slice(at, at + block)
        T[:, part] = U[:, part] @ np.linalg.inv(U[part, part])
    return T, U.diagonal() ** 2


def nearest_e8(x: np.ndarray) -> np.ndarray:
    """The point of E8 nearest to x [8]: of D8, or of D8 moved by a half."""

    def d8(y: np.ndarray) -> np.ndarray:
        z = np.rint(y)
        if int(z.sum()) % 2:
            at = int(np.abs(y - z).argmax())
            z[at] += 1.0 if y[at] > z[at] else -1.0
        return z

    a, b = d8(x), d8(x - 0.5) + 0.5
    return a if ((x - a) ** 2).sum() <= ((x - b) ** 2).sum() else b


def e8_radius(bits: int) -> float:
    """The squared radius of the ball around the origin that holds 2^(8·bits) points: as many as its volume."""
    return float((2 ** (8 * bits) * 24 / np.pi**4) ** 0.25)


def e8(W: np.ndarray, C: np.ndarray, G: np.ndarray, bits: int, scale: float) -> np.ndarray:
    """W [out, in] in points of E8, one scale for each output (its root mean square times `scale`)."""
    T, _ = unit_factor(C, 8)
    S, _ = unit_factor(G, 1)
    step = scale * np.sqrt((W**2).mean(1))
    most = e8_radius(bits)
    E, F = np.zeros_like(W), np.zeros_like(W)
    for at in range(0, W.shape[1], 8):
        part = slice(at, at + 8)
        carried = E[:, :at] @ T[:at, part]
        for i in range(len(W)):
            x = (W[i, part] + carried[i] + S[:i, i] @ F[:i, part]) / step[i]
            for _ in range(8):  # drawn in until its point lies in the ball
                q = nearest_e8(x)
                if (q**2).sum() <= most:
                    break
                x = x * min(0.97, (most / (q**2).sum()) ** 0.5)
            E[i, part] = W[i, part] - q * step[i]
            F[i, part] = E[i, part] + carried[i]
    return W - E


def trellis(W: np.ndarray, C: np.ndarray, G: np.ndarray, bits: int, scale: float) -> np.ndarray:
    """W [out, in] by a code of 256 states down each column: a state is the last 8 bits, with a normal quantile."""
    T, _ = unit_factor(C, 1)
    S, weight = unit_factor(G, 1)
    step = scale * np.sqrt((W**2).mean(1))
    branches = 1 << bits
    order = np.random.default_rng(0).permutation(STATES)
    values = torch.special.ndtri((torch.arange(STATES).double() + 0.5) / STATES).numpy()[order]
    before = np.arange(STATES) >> bits | np.arange(branches)[:, None] << int(log2(STATES)) - bits  # [branches, states]
    out, E = len(W), np.zeros_like(W)
    for j in range(W.shape[1]):
        carried = E[:, :j] @ T[:j, j]
        cost, F, chosen = np.zeros(STATES), np.zeros((STATES, out)), np.zeros((STATES, out))
        for i in range(out):
            target = W[i, j] + carried[i] + F[:, :i] @ S[:i, i]
            missed = target[before] - values * step[i]
            total = cost[before] + weight[i] * missed**2
            take = total.argmin(0)
            states = np.arange(STATES)
            old, cost = before[take, states], total[take, states]
            F[:, :i], chosen[:, :i] = F[old, :i], chosen[old, :i]
            chosen[:, i] = values * step[i]
            F[:, i] = W[i, j] - chosen[:, i] + carried[i]
        E[:, j] = W[:, j] - chosen[cost.argmin()]
    return W - E


def plain(W: torch.Tensor, grid: Grid, C: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """W on a grid of ours, the best of the ranges of scales."""
    tried = []
    for rounding._FED in RANGES:
        tried.append(quantize(W, grid, C, G, dtype=torch.bfloat16).dense())
    return min(tried, key=lambda Q: error(W - Q, C, G))


def found(W: torch.Tensor, C: torch.Tensor, G: torch.Tensor, slow: bool) -> Iterator[tuple[str, float, float]]:
    """Grids by name, with stored bits per weight and errors."""
    out, size = W.shape
    U, V = turned(size), turned(out, 1)
    W1, C1 = W @ U.T, U @ C @ U.T
    groups = [fitting_group(size, group) for group in (128, 32)]
    for bits, group in itertools.product((2, 3, 4), dict.fromkeys(groups)):
        if bits == 4 and group != groups[0]:
            continue  # there is no byte to compare with
        grid = Grid(bits, group)
        stored = bits + 16 / (group or size)
        yield f"today, {bits} bits, {group or 'channel'}", stored, error(W - plain(W, grid, C, G), C, G)
        if bits == 4:
            continue
        yield f"rotated, {bits} bits, {group or 'channel'}", stored, error(W1 - plain(W1, grid, C1, G), C1, G)
        half = half_steps(W, Half(bits, group), C, G)
        yield f"half, {bits} bits, {group or 'channel'}", stored, error(W - half, C, G)
        half = half_steps(W1, Half(bits, group), C1, G)
        yield f"half, rotated, {bits} bits, {group or 'channel'}", stored, error(W1 - half, C1, G)
        zeros = Grid(bits, group, symmetric=False)
        stored += bits / (group or size)
        yield f"zero points, {bits} bits, {group or 'channel'}", stored, error(W - plain(W, zeros, C, G), C, G)
    W2, G2 = V @ W1, V @ G @ V.T
    given = [x.numpy() for x in (W2, C1, G2)]
    for bits in (2, 3):
        tried = [e8(*given, bits, scale) for scale in ((0.95, 1.05) if bits == 2 else (0.5, 0.56))]
        yield f"E8, {bits} bits", bits + 16 / size, min(error(W2 - torch.from_numpy(Q), C1, G2) for Q in tried)
    if slow:
        for bits in (2, 3):
            Q = torch.from_numpy(trellis(*given, bits, 1.0))
            yield f"trellis, {bits} bits", bits + 16 / size, error(W2 - Q, C1, G2)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = of_linears(__doc__)
    parser.add_argument("--trellis", action="store_true", help="a minute or two for each linear")
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    bits_of: dict[str, float] = {}
    for linear, W, C, output in named(args, "spectrim"):
        rows = list(found(W, C, output.dense(len(W)), args.trellis))
        widest = str(fitting_group(W.shape[1], 128) or "channel")
        today = sorted(
            (stored, lost) for name, stored, lost in rows if name.startswith("today") and name.endswith(widest)
        )
        for name, stored, lost in rows:
            at = np.interp(stored, [x for x, _ in today], [y for _, y in today])
            ratios.setdefault(name, []).append(lost / at)
            bits_of[name] = stored
        print(linear, *(f"{name}: {values[-1]:.2f}" for name, values in ratios.items()), sep="\n  ", flush=True)
    print("\n| grid | bits per weight | error, × today's | least | largest |\n|---|---|---|---|---|")
    for name, values in ratios.items():
        mean = np.exp(np.mean(np.log(values)))
        print(f"| {name} | {bits_of[name]:.3f} | {mean:.2f} | {min(values):.2f} | {max(values):.2f} |")


if __name__ == "__main__":
    main()
