"""Model Breadcrumbs: drop the smallest entries and the outliers of each parameter.

Davari and Belilovsky, ECCV 2024 (arXiv 2312.06795).

Legend: `K` experts, `*S` parameter shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Preprocess
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import TaskVectors, dense_term


@dataclass(frozen=True)
class Breadcrumbs(Preprocess):
    """Keep floor(density * n) entries of each parameter: the largest after the floor(outliers * n) outliers.

    Its merge is base + coefficient x sum of the results, 0.3 in the paper. With `outliers` 0 it is the trim
    of `Ties(scope="parameter")`. A parameter too small for both keeps the remaining entries, at least one.

    Args:
        density: Fraction of entries to keep, in (0, 1].
        outliers: Fraction of the largest magnitudes to drop, in [0, 1 - density].
    """

    density: float = 0.15
    outliers: float = 0.007

    def __post_init__(self) -> None:
        check_fields(self, density="(0, 1]", outliers="[0, 1]")
        if not 0 < self.density <= 1 or not 0 <= self.outliers <= 1 - self.density + 1e-9:
            raise ValueError(
                "density must be in (0, 1] and outliers in [0, 1 - density], not "
                f"{self.density}, {self.outliers}"
            )

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        for name, delta in task_vectors.deltas.items():
            yield name, torch.stack([self._kept(dense_term(term, delta.base)) for term in delta.terms])

    def _kept(self, tau: Tensor) -> Tensor:
        size = tau.numel()
        top = int(self.outliers * size + 1e-6)
        count = max(1, int(self.density * size + 1e-6))
        order = tau.abs().flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(size, dtype=torch.bool)
        mask[order[top : top + count]] = True
        return tau * mask.view(tau.shape)
