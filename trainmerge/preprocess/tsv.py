"""Task singular vectors: low-rank experts whose singular vectors do not overlap.

Gargiulo et al., CVPR 2025 (arXiv 2412.00081).

Legend: `K` experts, `m x n` a matrix, `r` kept singular values of one expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.preprocess import Preprocess
from trainmerge.task_vectors import Delta, TaskVectors, dense_term

ROWS = 4096  # converted to float64 at a time
EPSILON = 1e-6  # singular values below this share of the largest are noise of the factorisation


@dataclass(frozen=True)
class Tsv(Preprocess):
    """Keep min(m, n) / K singular triples of each matrix; make those of all experts orthogonal to each other.

    TSV-M; its merge is base + sum of the results, coefficient 1. Parameters that are no matrices are divided
    by K. Singular values below 1e-6 of an expert's largest are left out before the whitening: the reference
    keeps them, and is wrong by half for low-rank experts. Nearly equal experts are a bad case by nature: the
    directions of their difference get the weight of a whole expert.

    Args:
        share: Share of min(m, n) that an expert keeps; None is 1 / K.
        orthogonal: Make the experts' singular vectors orthogonal; False is TSV-C's plain truncation.
    """

    share: float | None = None
    orthogonal: bool = True

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], not {self.share}")

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        for name, delta in task_vectors.deltas.items():
            matrix = len(delta.shape) == 2
            yield name, self._matrices(delta) if matrix else delta.dense() / len(delta.terms)

    def _matrices(self, delta: Delta) -> Tensor:
        share = 1 / len(delta.terms) if self.share is None else self.share
        rank = max(1, int(min(delta.shape) * share + 1e-9))
        triples = [truncated(dense_term(term, delta.base), rank) for term in delta.terms]
        left, values, right = (tuple(part) for part in zip(*triples, strict=True))
        sizes: list[int] = [len(value) for value in values]
        if self.orthogonal:
            left = torch.split(polar(torch.cat(left, dim=1)), sizes, dim=1)
            right = torch.split(polar(torch.cat(right, dim=1)), sizes, dim=1)
        return torch.stack([(u * s) @ v.T for u, s, v in zip(left, values, right, strict=True)])


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triples, at most `rank`: [m, n] -> U [m, r], S [r], V [n, r].

    By the eigenvectors of the smaller Gram matrix, in float64. Squaring costs half of its digits; those left
    are still more than a float32 factorisation of the matrix has: errors of 1e-5 against 5e-2 (relative,
    measured) for singular values of 1e-6 of the largest, the smallest that are kept. A 32,000 x 1,024
    embedding takes half of the time, and no second copy of it.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = truncated(matrix.T, rank)
        return left, values, right
    gram = torch.zeros(2 * matrix.shape[1:], dtype=torch.float64, device=matrix.device)
    for rows in torch.split(matrix, ROWS):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0).clamp_min(0).sqrt()
    kept = min(rank, int((values > EPSILON * values[:1]).sum()))
    values, v = values[:kept], vectors.flip(1)[:, :kept]
    scaled = v / values
    u = [(rows.double() @ scaled).to(matrix.dtype) for rows in torch.split(matrix, ROWS)]
    return torch.cat(u), values.to(matrix.dtype), v.to(matrix.dtype)


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, if it is wide); directions of no length stay out."""
    u, s, v = truncated(matrix, min(matrix.shape))
    del s
    return u @ v.T
