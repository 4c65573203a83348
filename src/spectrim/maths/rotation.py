"""Rotations of a linear's inputs that spread a large one over its neighbours (docs/methods.md, section 8).

``W x = (W Rᵀ)(R x)`` with an orthogonal R that takes 16 neighbours at a time: a Hadamard matrix of ±1 over 4, whose
columns have signs. Floats of 16 bits hold its entries exactly.
"""

from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensor

from spectrim.maths.roots import wide

BLOCK = 16  # neighbours; more were no better (docs/results.md, "Rotated inputs")


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's orthogonal matrix [size, size] float64 of a power of two, on the CPU."""
    H = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / size**0.5


def _made() -> torch.Tensor:
    """R [16, 16] float32: its signs are random and always the same."""
    with torch.inference_mode(mode=False):  # what is made in it cannot be part of a graph later
        signs = torch.randint(2, (BLOCK,), generator=torch.Generator().manual_seed(0), device="cpu") * 2 - 1
        return (hadamard(BLOCK) * signs).float()


_R = _made()


@cache
def _held(dtype: torch.dtype, device: torch.device, back: bool) -> torch.Tensor:
    """What rows are multiplied by, R or its transpose."""
    with torch.inference_mode(mode=False):
        return (_R if back else _R.T.contiguous()).to(device, dtype)


def matrix(dtype: torch.dtype, device: torch.device | str | None = None) -> torch.Tensor:
    """R [16, 16], for code that is compiled around a tensor that it has."""
    return torch.tensor(_R.tolist(), dtype=dtype, device=device)


def _by_blocks(x: torch.Tensor, R: torch.Tensor | None, *, back: bool) -> torch.Tensor:
    # On CPUs without products of 16 bits these are 2 to 16 times slower than two conversions and one of float32.
    blocks = x.reshape(-1, BLOCK) if x.is_cuda else wide(x.reshape(-1, BLOCK))
    if R is None and torch.compiler.is_compiling():
        R = _R
    elif R is None and isinstance(blocks, FakeTensor):  # its mode takes no tensor from outside, and leaves none
        R = matrix(blocks.dtype, x.device)
    if R is None:
        R = _held(blocks.dtype, x.device, back)
    else:
        R = (R if back else R.T).to(x.device, blocks.dtype)
    return (blocks @ R).to(x.dtype).view(x.shape)


def turned(x: torch.Tensor, R: torch.Tensor | None = None) -> torch.Tensor:
    """``R x`` of inputs x [..., in], or ``W Rᵀ`` of a weight W [out, in]; in its dtype. R may be at hand (`matrix`)."""
    return _by_blocks(x, R, back=False)


def turned_back(W: torch.Tensor) -> torch.Tensor:
    """``W R`` of W [out, in]: the weight on inputs as they are, of one on turned inputs."""
    return _by_blocks(W, None, back=True)


def turned_metric(C: torch.Tensor) -> torch.Tensor:
    """``R C Rᵀ`` of a metric of the inputs, [in, in]; the one copy that is made, since it may be gigabytes."""
    found, R = turned(C), _held(C.dtype, C.device, True)
    for rows in found.split(BLOCK):
        rows.copy_(R @ rows)
    return found
