"""A matrix as two thin factors: stacked, recompressed without the matrix, or cut from its singular values.

The best rank-r approximation keeps the r largest singular values (Eckart and Young, 1936). A matrix that is a
product `up @ down` already is decomposed by two QR factorisations and the SVD of an R x R core. Large dense
matrices are projected onto a random subspace first (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and
5.1); their error is exact in any case, because it is the part outside of the subspace.

Legend: `m x n` a matrix, `R` the rank of stacked factors, `r` the kept rank. All sums are float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainmerge.system.ranges import check_fields

EXACT = 1024  # the smaller side up to which the SVD is exact: 1 s there on one core
OVERSAMPLING, POWERS = 8, 2  # of the random subspace
FIRST = 32  # rank that is tried first for an energy
ROWS = 1 << 22  # entries that are converted to float64 at a time
ROUNDING = 2.0**-52


@dataclass(frozen=True)
class Budget:
    """How much of a matrix is kept.

    Args:
        rank: The most singular values.
        energy: The share of the squared norm; the fewest singular values that have it.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, "adapter", rank="[1, inf)", energy="(0, 1]")
        if self.rank is not None and self.energy is not None:
            raise ValueError("adapter.rank and adapter.energy exclude each other: name one of them")

    @property
    def is_open(self) -> bool:
        """Whether it names neither."""
        return self.rank is None and self.energy is None

    def kept(self, squares: Tensor, total: float, side: int) -> int:
        """The number of singular values to keep.

        Args:
            squares: Squared singular values, descending, [s] float64.
            total: The matrix's squared norm.
            side: Its longer side, for the bound of rounding.
        """
        if total <= 0:
            return 0
        solid = int((squares > squares[0] * (side * ROUNDING) ** 2).sum())
        if self.rank is not None:
            return min(self.rank, solid)
        share = 1.0 if self.energy is None else self.energy
        short = squares.cumsum(0) < share * total * (1 - side * ROUNDING)
        return min(int(short.sum()) + 1, solid)


class Factors(NamedTuple):
    """A matrix of rank r near another one."""

    up: Tensor  # [m, r] float64
    down: Tensor  # [r, n] float64
    square: float  # squared norm of the other matrix
    lost: float  # squared norm of the difference
    how: str  # `exact`, `recompressed`, `SVD` or `randomised SVD`

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    def rounded(self, dtype: torch.dtype) -> "Factors":
        """The same in another dtype, with the rounding in `lost`."""
        up, down = self.up.to(dtype), self.down.to(dtype)
        off = self.up - up.double()
        wide = torch.cat([off, up.double()], dim=1)
        tall = torch.cat([self.down, self.down - down.double()])
        return self._replace(up=up, down=down, lost=self.lost + product_square(wide, tall))


def product_square(up: Tensor, down: Tensor) -> float:
    """The squared norm of `up @ down`, [m, R] and [R, n] float64, without the product."""
    return float(_core(up, down)[1].square().sum())


def recompress(up: Tensor, down: Tensor, budget: Budget) -> Factors:
    """`up @ down`, [m, R] and [R, n] float64, with fewer columns where the budget asks for that.

    The factors themselves are returned where nothing is cut.
    """
    left, core, right = _core(up, down)
    square, size = float(core.square().sum()), len(down)
    if budget.is_open or square == 0 or (budget.rank is not None and size <= budget.rank):
        return Factors(up, down, square, 0.0, "exact")
    u, values, v = torch.linalg.svd(core, full_matrices=False)
    squares = values.square()
    kept = budget.kept(squares, square, max(len(up), down.shape[1]))
    if kept == size:
        return Factors(up, down, square, 0.0, "exact")
    root = values[:kept].sqrt()
    lost = float(squares[kept:].sum())
    return Factors(
        left @ (u[:, :kept] * root), (root[:, None] * v[:kept]) @ right, square, lost, "recompressed"
    )


def truncate(matrix: Tensor, budget: Budget) -> Factors:
    """The leading singular triples of a matrix [m, n] that the budget keeps, their roots in both factors."""
    square = sum(float(rows.square().sum()) for _, rows in _wide_rows(matrix))
    small, rank = min(matrix.shape), FIRST if budget.rank is None else budget.rank
    while small > EXACT and 4 * (rank + OVERSAMPLING) < small:
        u, values, v = _subspace(matrix, rank + OVERSAMPLING)
        kept = budget.kept(values.square(), square, max(matrix.shape))
        if budget.rank is not None or kept <= rank:
            return _cut(u, values, v, kept, square, "randomised SVD")
        rank *= 2
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return _cut(u, values, v, budget.kept(values.square(), square, max(matrix.shape)), square, "SVD")


def _cut(u: Tensor, values: Tensor, v: Tensor, kept: int, square: float, how: str) -> Factors:
    """The first `kept` triples of u [m, s], values [s], v [s, n]; the rest, in and outside of u, is lost."""
    root = values[:kept].sqrt()
    inside = float(values[kept:].square().sum())
    outside = max(0.0, square - float(values.square().sum())) if how != "SVD" else 0.0
    return Factors(u[:, :kept] * root, root[:, None] * v[:kept], square, inside + outside, how)


def _core(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal left [m, a] and right [b, n], and a core [a, b], whose product is `up @ down`."""
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    return left, upper @ lower.T, right.T


def _subspace(matrix: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triples by a random subspace with power iterations: [m, s], [s], [s, n].

    The generator is seeded, so the same matrix gives the same triples.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[1], size, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(_times(matrix, probe))[0]
    for _ in range(POWERS):
        basis = torch.linalg.qr(_times(matrix, torch.linalg.qr(_back(matrix, basis))[0]))[0]
    u, values, v = torch.linalg.svd(_back(matrix, basis).T, full_matrices=False)
    return basis @ u, values, v


def _times(matrix: Tensor, right: Tensor) -> Tensor:
    """[m, n] x [n, s] -> [m, s] float64."""
    return torch.cat([rows @ right for _, rows in _wide_rows(matrix)])


def _back(matrix: Tensor, left: Tensor) -> Tensor:
    """[m, n]^T x [m, s] -> [n, s] float64."""
    total = torch.zeros(matrix.shape[1], left.shape[1], dtype=torch.float64)
    for part, rows in _wide_rows(matrix):
        total.addmm_(rows.T, left[part])
    return total


def _wide_rows(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows in float64, with their places."""
    step = max(1, ROWS // max(1, matrix.shape[1]))
    for first in range(0, len(matrix), step):
        part = slice(first, min(first + step, len(matrix)))
        yield part, matrix[part].double()
