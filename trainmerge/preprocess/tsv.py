"""Task singular vectors: low-rank experts whose singular vectors do not overlap.

Gargiulo et al., CVPR 2025 (arXiv 2412.00081).

Legend: `K` experts, `m x n` a matrix, `r` leading singular values of one expert.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Preprocess
from trainmerge.preprocess.matrices import is_matrix
from trainmerge.preprocess.spectrum import polar, square_norm, truncated
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors, dense_term

Triples = tuple[Tensor, Tensor, Tensor]  # U [m, r], S [r], V [n, r]
TWINS = 0.95  # cosine of nearly equal experts; those of different tasks are far below


@dataclass(frozen=True)
class Tsv(Preprocess):
    """Keep min(m, n) / K singular triples per expert and matrix, and orthogonalise them between experts.

    TSV-M; its merge is base + sum of the results, coefficient 1. Parameters that are not matrices are divided
    by K. Singular values below 1e-6 of an expert's largest are removed before the whitening: the reference
    keeps them, and is wrong by half for low-rank experts. The method is unsuitable for nearly equal experts:
    the directions of their difference get the weight of a whole expert. A warning names them.

    Args:
        share: Fraction of min(m, n) that an expert keeps; None is 1 / K.
        energy: Keep the fewest triples that have this share of an expert's squared norm, at most `share`: a
            rank per matrix in place of one for all. 1 is `share` alone.
        orthogonal: Make the experts' singular vectors orthogonal; False is TSV-C's plain truncation.
        exclude: fnmatch patterns of matrices that are averaged, embeddings say.
    """

    share: float | None = None
    orthogonal: bool = True
    exclude: Sequence[str] = ()
    energy: float = field(default=1.0, metadata={"added": "0.2.0"})
    otherwise: ClassVar[str] = "divided by K"

    def __post_init__(self) -> None:
        check_fields(self, share="(0, 1]", energy="(0, 1]")

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        experts = task_vectors.experts
        overlaps = torch.zeros(len(experts), len(experts), dtype=torch.float64)
        for name, delta in task_vectors.deltas.items():
            if not self.applies_to(name, delta):
                yield name, delta.dense() / len(experts)
                continue
            results = []
            for matrices in _matrices(delta):  # inputs and outputs enter alike, so their order is irrelevant
                triples = self._triples(matrices, delta)
                overlaps += _inner_products(triples)
                results.append(self._merged(triples))
            yield name, results[0] if len(delta.shape) == 2 else torch.stack(results, dim=1)
        if self.orthogonal:
            _warn_of_twins(experts, overlaps)

    @override
    def applies_to(self, name: str, delta: Delta) -> bool:
        return is_matrix(name, delta, self.exclude)

    def _triples(self, matrices: Iterable[Tensor], delta: Delta) -> list[Triples]:
        share = 1 / len(delta.terms) if self.share is None else self.share
        rank = max(1, int(min(delta.shape[-2:]) * share + 1e-9))
        return [self._leading(matrix, rank) for matrix in matrices]

    def _leading(self, matrix: Tensor, rank: int) -> Triples:
        u, s, v = truncated(matrix, rank)
        if self.energy < 1:
            short = s.double().square().cumsum(0) < self.energy * square_norm(matrix) * (1 - 1e-12)
            kept = min(int(short.sum()) + 1, len(s))
            u, s, v = u[:, :kept], s[:kept], v[:, :kept]
        return u, s, v

    def _merged(self, triples: Sequence[Triples]) -> Tensor:
        left, values, right = (tuple(part) for part in zip(*triples, strict=True))
        sizes: list[int] = [len(value) for value in values]
        if self.orthogonal:
            left = torch.split(polar(torch.cat(left, dim=1)), sizes, dim=1)
            right = torch.split(polar(torch.cat(right, dim=1)), sizes, dim=1)
        taus: Tensor = left[0].new_empty(len(left), len(left[0]), len(right[0]))  # never stacked
        for tau, u, s, v in zip(taus, left, values, right, strict=True):
            torch.mm(u * s, v.T, out=tau)
        return taus


def _matrices(delta: Delta) -> Iterator[Iterable[Tensor]]:
    """Each matrix of a parameter: its K differences [m, n], those of a single one not all at once."""
    if len(delta.shape) == 2:
        yield (dense_term(term, delta.base) for term in delta.terms)
    else:
        yield from delta.dense().unbind(dim=1)


def _inner_products(triples: Sequence[Triples]) -> Tensor:
    """Cosines of the experts' leading parts, [K, K] float64, without forming the matrices."""
    products = [
        (s[:, None] * (u.T @ other_u) * other_s * (v.T @ other_v)).double().sum()
        for u, s, v in triples
        for other_u, other_s, other_v in triples
    ]
    return torch.stack(products).view(len(triples), len(triples)).cpu()


def _warn_of_twins(experts: Sequence[str], overlaps: Tensor) -> None:
    norms = overlaps.diagonal().clamp_min(torch.finfo(overlaps.dtype).tiny).sqrt()
    cosines = overlaps / norms / norms[:, None]
    for first, second in torch.nonzero((cosines > TWINS).triu(1)).tolist():
        warnings.warn(
            f"Tsv: {experts[first]} and {experts[second]} are nearly equal (cosine "
            f"{cosines[first, second]:.3f}); the directions of their difference get the weight of a whole "
            "expert: remove one of them, or average them first",
            stacklevel=3,
        )
