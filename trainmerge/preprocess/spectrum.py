"""Singular triples of tall and wide matrices from the eigenvectors of their smaller Gram matrix.

Legend: `K` experts, `m x n` a matrix, `r` leading singular triples.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 4096  # converted to float64 at a time
EPSILON = 1e-6  # singular values below this fraction of the largest are rounding noise


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triples, at most `rank`: [m, n] -> U [m, r], S [r], V [n, r].

    From the eigenvectors of the smaller Gram matrix, in float64. Squaring loses half of the digits: a triple
    whose singular value is s times the largest has an error of about 1e-17 / s^2, which is 1e-5 at the
    smallest that are kept. For float32 matrices this is more accurate than a float32 factorisation (5e-2
    there, measured); for float64 matrices a float64 factorisation would be better. A 32,000 x 1,024 embedding
    takes half of the time, without a second copy.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = truncated(matrix.T, rank)
        return left, values, right
    squares, vectors = torch.linalg.eigh(gram(matrix))
    values = squares.flip(0).clamp_min(0).sqrt()
    kept = min(rank, int((values > EPSILON * values[:1]).sum()))
    values, v = values[:kept], vectors.flip(1)[:, :kept]
    scaled = v / values
    u = [(rows @ scaled).to(matrix.dtype) for rows in wide_rows(matrix)]
    return torch.cat(u), values.to(matrix.dtype), v.to(matrix.dtype)


def gram(matrix: Tensor) -> Tensor:
    """Its columns' inner products, [m, n] -> [n, n] float64."""
    total = torch.zeros(2 * matrix.shape[1:], dtype=torch.float64, device=matrix.device)
    for rows in wide_rows(matrix):
        total.addmm_(rows.T, rows)
    return total


def wide_rows(matrix: Tensor) -> Iterator[Tensor]:
    """Blocks of rows, in float64."""
    return (rows.double() for rows in torch.split(matrix, ROWS))


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, if it is wide), without zero directions."""
    u, _, v = truncated(matrix, min(matrix.shape))
    return u @ v.T


def input_directions(taus: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors of C = sum_k tau_k^T tau_k / |tau_k|^2: [r], [n, r].

    Float64. Rounding noise is left out, and so are experts that do not change the matrix: r is 0 if none
    does. C itself, n x n, is not formed if all experts together have fewer rows than n.
    """
    sizes = torch.stack([square_norm(tau) for tau in taus])
    shares = torch.where(sizes > 0, 1 / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), 0.0)
    if taus.shape[0] * taus.shape[1] < taus.shape[2]:
        stacked = (taus.double() * shares.sqrt()[:, None, None]).flatten(0, 1)
        _, values, vectors = truncated(stacked, len(stacked))
        return values.square(), vectors
    total = torch.zeros(2 * taus.shape[2:], dtype=torch.float64, device=taus.device)
    for tau, share in zip(taus, shares, strict=True):
        total += gram(tau).mul_(share)
    squares, vectors = torch.linalg.eigh(total)
    solid = int((squares > EPSILON**2 * squares[-1]).sum())
    return squares.flip(0)[:solid], vectors.flip(1)[:, :solid]


def square_norm(matrix: Tensor) -> Tensor:
    """The sum of squared entries, a float64 scalar."""
    return torch.stack([rows.square().sum() for rows in wide_rows(matrix)]).sum()


def moment_times(matrix: Tensor, directions: Tensor) -> Tensor:
    """Its Gram matrix times [n, r], float64 [n, r]; forms n x n numbers only if the matrix has as many."""
    if matrix.shape[0] >= matrix.shape[1]:
        return gram(matrix) @ directions
    total = torch.zeros_like(directions)
    for rows in wide_rows(matrix):
        total.addmm_(rows.T, rows @ directions)
    return total
