"""Sums of products ``Σ x xᵀ``: as the rows x while they are few, then as the lower half of the sum, in float64."""

from collections.abc import Iterable, Iterator, Sequence
from math import isqrt

import torch

SLAB = 512  # rows of a sum that are formed and kept together


def few_rows(width: int) -> int:
    """How many rows of `width` numbers take no more room than half of the matrix of their products."""
    return width // 2


def gram_bytes(width: int, rows: int | None, itemsize: int) -> int:
    """Bytes that a :class:`Gram` takes at most, where about so many rows come (None: many), of numbers of `itemsize`.

    Twice as many rows may come before more is taken.
    """
    if rows is None or 2 * rows > few_rows(width):
        return sum(8 * (stop - start) * stop for start, stop in _spans(width))
    return rows * width * itemsize


def packed_bytes(width: int, rows: int | None, itemsize: int) -> int:
    """Bytes of its rows, or of the half of its sum (`Gram.half`), where so many rows came."""
    entries = width * (width + 1) // 2 if rows is None or rows > few_rows(width) else rows * width
    return entries * itemsize


def half_width(entries: int) -> int | None:
    """The width of a symmetric matrix whose half has so many entries; None where there is none."""
    width = (isqrt(8 * entries + 1) - 1) // 2
    return width if width * (width + 1) // 2 == entries else None


def _spans(width: int) -> Iterator[tuple[int, int]]:
    """Where slabs begin and end."""
    return ((start, min(start + SLAB, width)) for start in range(0, width, SLAB))


def _products(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The slabs of the sum over rows x [n, width], one at a time, as precisely as the rows are."""
    return (x[:, start:stop].T @ x[:, :stop] for start, stop in _spans(x.shape[1]))


class Gram:
    """``Σ x xᵀ`` [width, width] over rows x of one width, symmetric to the bit.

    Which form it has follows from the number of rows alone: a sum that goes on from a file ends with the same bits. Of
    the sum only what lies on and below the diagonal counts: a slab is some neighbouring rows, as far as the diagonal.

    Args:
        width: of a row.
        rows: of it so far, [n, width], float32 or float64.
        slabs: of the sum so far, [≤ SLAB, end of the slab] each, float64, in place of rows.
    """

    def __init__(
        self, width: int, *, rows: torch.Tensor | None = None, slabs: Iterable[torch.Tensor] | None = None
    ) -> None:
        self.width = width
        self.slabs = None if slabs is None else [*slabs]
        self._rows = [] if rows is None else [rows]

    @classmethod
    def of(cls, matrix: torch.Tensor) -> "Gram":
        """That of a symmetric matrix [width, width] float64, which it reads and does not copy."""
        return cls(len(matrix), slabs=(matrix[start:stop, :stop] for start, stop in _spans(len(matrix))))

    @classmethod
    def of_half(cls, half: torch.Tensor) -> "Gram":
        """That of the half of a symmetric matrix (see `half`)."""
        width = half_width(len(half))
        assert width is not None
        slabs, begin = [], 0
        for start, stop in _spans(width):
            slabs.append(torch.zeros(stop - start, stop, dtype=torch.float64, device=half.device))
            for number, row in enumerate(slabs[-1], start + 1):
                row[:number] = half[begin : begin + number]
                begin += number
        return cls(width, slabs=slabs)

    @property
    def rows(self) -> torch.Tensor | None:
        """The rows [n, width], float32 or float64; None once they are summed."""
        if self.slabs is not None:
            return None
        if len(self._rows) != 1:
            self._rows = [torch.cat(self._rows)] if self._rows else [torch.zeros(0, self.width)]
        return self._rows[0]

    @property
    def parts(self) -> list[torch.Tensor]:
        """The tensors that it holds, of rows or of the sum."""
        return self._rows if self.slabs is None else self.slabs

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(part.nbytes for part in self.parts)

    def to(self, home: torch.device) -> "Gram":
        """The same on the device `home`."""
        if (rows := self.rows) is not None:
            return Gram(self.width, rows=rows.to(home))
        return Gram(self.width, slabs=(slab.to(home) for slab in self.sum()))

    def hold(self, rows: Sequence[torch.Tensor]) -> None:
        """Rows [n, width] one after the other, in place of all that there are."""
        self._rows = [torch.cat([*rows])]

    def add(self, x: torch.Tensor, home: torch.device) -> None:
        """Add rows x [n, width] of at least float32; kept on the device `home`."""
        if self.slabs is not None:
            self._add(x)
            return
        self._rows.append(x.to(home, copy=True))
        if sum(map(len, self._rows)) > few_rows(self.width):
            self.sum()

    def sum(self) -> list[torch.Tensor]:
        """The slabs of the sum, in place of the rows from now on."""
        if self.slabs is None:
            rows = self.rows
            assert rows is not None
            home, spans = rows.device, _spans(self.width)
            self.slabs = [torch.zeros(stop - start, stop, dtype=torch.float64, device=home) for start, stop in spans]
            self._add(rows)
            self._rows = []
        return self.slabs

    def _add(self, x: torch.Tensor) -> None:
        """Products are formed where and as precisely as the rows are."""
        assert self.slabs is not None
        for slab, product in zip(self.slabs, _products(x), strict=True):
            slab += product.to(slab.device)

    def dense(self) -> torch.Tensor:
        """The sum [width, width] float64."""
        rows = self.rows
        home = self.parts[0].device if rows is None else rows.device
        matrix = torch.zeros(self.width, self.width, dtype=torch.float64, device=home)
        self.add_to(matrix)
        return matrix

    def add_to(self, matrix: torch.Tensor, count: float = 1.0, weight: float = 1.0) -> None:
        """Add the sum over `count`, times `weight`, to a matrix [width, width] float64; none of its size is made."""
        rows = self.rows
        slabs = self.parts if rows is None else (product.double() for product in _products(rows))
        for (start, stop), slab in zip(_spans(self.width), slabs, strict=True):
            mean = slab / count if count != 1 else slab
            corner = mean[:, start:].tril()
            matrix[start:stop, :start].add_(mean[:, :start], alpha=weight)
            matrix[:start, start:stop].add_(mean[:, :start].T, alpha=weight)
            matrix[start:stop, start:stop].add_(corner + corner.tril(-1).T, alpha=weight)

    def diagonal(self) -> torch.Tensor:
        """Of the sum, [width] float64."""
        if (rows := self.rows) is not None:
            return rows.double().square().sum(0)
        return torch.cat([slab[:, slab.shape[1] - len(slab) :].diagonal() for slab in self.sum()])

    def trace(self) -> float:
        """Of the sum."""
        return float(self.diagonal().sum())

    def times(self, X: torch.Tensor) -> torch.Tensor:
        """The sum times X [width, n], in the dtype of X; through the rows where there are any."""
        rows = self.rows
        return self.dense().to(X) @ X if rows is None else rows.to(X).T @ (rows.to(X) @ X)

    def half(self, dtype: torch.dtype) -> torch.Tensor:
        """The sum as far as its diagonal, row after row, [width (width + 1) / 2] in `dtype`."""
        spans = zip(_spans(self.width), self.sum(), strict=True)
        return torch.cat([row[:n] for (start, _), slab in spans for n, row in enumerate(slab.to(dtype), start + 1)])
