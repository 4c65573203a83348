"""Sums of products, grown in float64 without a second matrix of their size."""

from collections.abc import Sequence
from math import isqrt

import torch

SLAB = 2048  # rows of a product that are formed at once


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += leftᵀ right`` for left [n, rows] and right [n, columns], formed where and as precisely as they are.

    `total` [rows, columns] may be on another device and is usually float64.
    """
    for start in range(0, left.shape[1], SLAB):
        product = left[:, start : start + SLAB].T @ right  # [≤ SLAB, columns]
        total[start : start + SLAB] += product.to(total.device)


def few_rows(width: int) -> int:
    """How many rows of `width` numbers take no more room than half of the matrix of their products."""
    return width // 2


def gram_bytes(width: int, rows: int | None, itemsize: int) -> int:
    """Bytes that a :class:`Gram` takes at most, where about so many rows come (None: many), of numbers of `itemsize`.

    Twice as many rows may come before more is taken.
    """
    return 8 * width**2 if rows is None or 2 * rows > few_rows(width) else rows * width * itemsize


def packed_bytes(width: int, rows: int | None, itemsize: int) -> int:
    """Bytes of its rows, or of the half of its sum (`pack_half`), where so many rows came."""
    entries = width * (width + 1) // 2 if rows is None or rows > few_rows(width) else rows * width
    return entries * itemsize


class Gram:
    """``Σ x xᵀ`` [width, width] over rows x of one width: the rows while they are few, afterwards their sum in float64.

    Which of both it is follows from the number of rows alone: a sum that goes on from a file ends with the same bits.

    Args:
        width: of a row.
        rows: of it so far, [n, width], float32 or float64.
        matrix: the sum so far, [width, width] float64, in place of rows.
    """

    def __init__(self, width: int, *, rows: torch.Tensor | None = None, matrix: torch.Tensor | None = None) -> None:
        self.width = width
        self.matrix = matrix  # symmetric up to the rounding of products while it grows
        self._rows = [] if rows is None else [rows]

    @classmethod
    def of(cls, matrix: torch.Tensor) -> "Gram":
        """That of a symmetric matrix [width, width] float64."""
        return cls(len(matrix), matrix=matrix)

    @property
    def rows(self) -> torch.Tensor | None:
        """The rows [n, width], float32 or float64; None once they are summed."""
        if self.matrix is not None:
            return None
        if len(self._rows) != 1:
            self._rows = [torch.cat(self._rows)] if self._rows else [torch.zeros(0, self.width)]
        return self._rows[0]

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(rows.nbytes for rows in self._rows) if self.matrix is None else self.matrix.nbytes

    def to(self, home: torch.device) -> "Gram":
        """The same on the device `home`."""
        rows, matrix = self.rows, self.matrix
        return Gram(
            self.width,
            rows=None if rows is None else rows.to(home),
            matrix=None if matrix is None else matrix.to(home),
        )

    def hold(self, rows: Sequence[torch.Tensor]) -> None:
        """Rows [n, width] one after the other, in place of all that there are."""
        self._rows = [torch.cat([part.to(rows[0].device) for part in rows])]

    def add(self, x: torch.Tensor, home: torch.device) -> None:
        """Add rows x [n, width] of at least float32; kept on the device `home`."""
        if self.matrix is not None:
            add_product(self.matrix, x, x)
            return
        self._rows.append(x.to(home, copy=True))
        if sum(map(len, self._rows)) > few_rows(self.width):
            self.fold()

    def fold(self) -> torch.Tensor:
        """The sum, in place of the rows from now on."""
        if (rows := self.rows) is not None:
            self._rows = []
            self.matrix = torch.zeros(self.width, self.width, dtype=torch.float64, device=rows.device)
            add_product(self.matrix, rows, rows)
        assert self.matrix is not None
        return self.matrix

    def dense(self) -> torch.Tensor:
        """The sum [width, width] float64."""
        if self.matrix is not None:
            return self.matrix
        total = Gram(self.width, rows=self.rows).fold()
        return (total + total.T).div_(2)

    def trace(self) -> float:
        """Of the sum."""
        rows = self.rows
        return float(self.dense().trace() if rows is None else rows.double().square().sum())

    def times(self, X: torch.Tensor) -> torch.Tensor:
        """The sum times X [width, n], in the dtype of X; through the rows where there are any."""
        rows = self.rows
        return self.dense().to(X) @ X if rows is None else rows.to(X).T @ (rows.to(X) @ X)


def pack_half(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The lower triangle of a symmetric matrix [n, n], row after row, [n (n + 1) / 2] in `dtype`.

    Of a matrix that is symmetric up to rounding, both halves are averaged.
    """
    packed = []
    for start in range(0, len(matrix), SLAB):
        slab = matrix[start : start + SLAB, : start + SLAB]
        slab = ((slab + matrix[: start + SLAB, start : start + SLAB].T) / 2).to(dtype)
        packed += [row[: start + number + 1] for number, row in enumerate(slab)]
    return torch.cat(packed)


def half_width(entries: int) -> int | None:
    """The width of a symmetric matrix whose half has so many entries; None where there is none."""
    width = (isqrt(8 * entries + 1) - 1) // 2
    return width if width * (width + 1) // 2 == entries else None


def unpack_half(packed: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix [n, n] float64 of its half, as `pack_half` gives it."""
    width = half_width(len(packed))
    assert width is not None
    matrix, begin = torch.empty(width, width, dtype=torch.float64, device=packed.device), 0
    for start in range(0, width, SLAB):
        stop = min(start + SLAB, width)
        for row in range(start, stop):
            matrix[row, : row + 1] = packed[begin : (begin := begin + row + 1)]
        matrix[:start, start:stop] = matrix[start:stop, :start].T
        corner = matrix[start:stop, start:stop].tril()
        matrix[start:stop, start:stop] = corner + corner.tril(-1).T
    return matrix
