"""A weight in few bits, and a product of factors beside it that makes up for the rounding (docs/methods.md, 8)."""

from typing import Any

import torch

from spectrim.maths.decompose import decompose, sides
from spectrim.maths.roots import check_finite
from spectrim.storage.base import Options, Spec, Tensors, register
from spectrim.storage.integer_factors import IntegerFactors, balance, load_rounded, ranks
from spectrim.storage.integers import allowed_bits, rounded
from spectrim.storage.low_rank import rank_of
from spectrim.storage.problem import Problem

RESIDUAL_BITS = (2, 3, 4)  # of the whole weight
FACTOR_BITS = 8  # of the factors beside it
MOST = 4  # steps of rank that are options


class IntegersAndFactors(IntegerFactors):
    """``rank``, and ``grids`` of R, the whole weight, and of A and B; without those of A and B these are floats."""

    name = "integers+factors"
    marker = "R.weight_packed"
    made_of = (frozenset("R"), frozenset("ABR"))

    def options(self, problem: Problem) -> Options:
        """Small ranks beside 2, 3 or 4 bits, where the recipe leaves the bits to the allocation."""
        rows: list[tuple[int, float, Spec]] = []
        if problem.heads > 1 or problem.quantize.bits != "auto" or not allowed_bits(problem):
            return Options.listed(self.name, rows)
        out, size = problem.W.shape
        for bits in RESIDUAL_BITS:
            grid = problem.grid(bits, size)
            each = problem.noise(problem.W, grid)
            # The rounding errors of the entries are taken for independent, of random sign and of the predicted size.
            # k factors beside the integers then remove the k largest squared singular values of such a matrix.
            N = each.sqrt() if out <= size else each.sqrt().T
            N = N * torch.randn(N.shape, generator=torch.Generator().manual_seed(0), dtype=N.dtype).sign().to(N)
            removed = torch.linalg.eigvalsh(N @ N.T).flip(0).cumsum(0).tolist()
            for count in ranks(problem)[:MOST]:
                if count > (len(problem.left) - 1) // 2:
                    break
                spec = self.spec(problem, count, FACTOR_BITS)
                spec["grids"]["R"] = grid.spec
                rows.append((self.nbytes(problem.linear, spec), float(each.sum()) - removed[count - 1], spec))
        return Options.listed(self.name, rows)

    def make(self, problem: Problem, spec: Spec) -> Tensors:
        """The weight rounded, then factors of what is left, in the same metrics."""
        layer: Any = self.build(problem.empty(), spec)
        whole = rounded(problem, problem.W, layer.R.grid, problem.C, problem.G, problem.linear.dtype)
        layer.R.load(whole)
        W = problem.W.double() - whole.dense()
        rank = rank_of(spec)
        directions = decompose(W, problem.C, problem.output).directions(rank, W.device)
        if "B" in spec["grids"]:
            load_rounded(problem, layer, W, directions)
            return layer.state_dict()
        # Powers of two move between float factors, so that those of float16 are normal numbers.
        A, B = (part.double() for part in sides(W, *directions[1:]))
        sizes = (M.abs().amax(1, keepdim=True) for M in (A.T, B))
        power = balance(*(size.where(size > 0, torch.nan) for size in sizes))  # [k]
        for name, factor in (("A", A := A / power), ("B", B := B * power[:, None])):
            check_finite(f"its factor {name}", factor)
        layer.load_factors(A, B)
        return layer.state_dict()


register(IntegersAndFactors())
