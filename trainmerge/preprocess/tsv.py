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
from trainmerge.task_vectors import TaskVectors

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
            taus = delta.dense()
            yield name, self._matrices(taus) if taus.dim() == 3 else taus / len(taus)

    def _matrices(self, taus: Tensor) -> Tensor:
        share = 1 / len(taus) if self.share is None else self.share
        rank = max(1, int(min(taus.shape[1:]) * share + 1e-9))
        triples = [truncated(tau, rank) for tau in taus]
        left, values, right = (tuple(part) for part in zip(*triples, strict=True))
        sizes: list[int] = [len(value) for value in values]
        if self.orthogonal:
            left = torch.split(polar(torch.cat(left, dim=1)), sizes, dim=1)
            right = torch.split(polar(torch.cat(right, dim=1)), sizes, dim=1)
        return torch.stack([(u * s) @ v.T for u, s, v in zip(left, values, right, strict=True)])


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triples, at most `rank`: [m, n] -> U [m, r], S [r], V [n, r]."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, int((s > EPSILON * s[:1]).sum()))
    return u[:, :kept], s[:kept], vh[:kept].T


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, if it is wide); directions of no length stay out."""
    u, s, v = truncated(matrix, min(matrix.shape))
    del s
    return u @ v.T
