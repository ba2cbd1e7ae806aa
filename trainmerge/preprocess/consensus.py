"""Consensus merging: keep the entries that several experts need.

Wang et al., ICML 2024 (arXiv 2405.07813), with its TALL masks.

Legend: `K` experts, `*S` parameter shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.piecewise import Piecewise, Rule
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors


@dataclass(frozen=True)
class Consensus(Piecewise):
    """Keep an entry if at least `agree` experts have |tau_k| > threshold |sum - tau_k| there (TALL masks).

    Its merge is base + coefficient x sum of the results. The paper chooses one threshold per task on labelled
    validation data, from 0.2 to 0.6.

    Args:
        agree: How many experts must need an entry: 2 drops entries that at most one needs, 0 keeps all.
        threshold: One, or one per expert.
    """

    agree: int = 2
    threshold: float | Sequence[float] = 0.4

    def __post_init__(self) -> None:
        check_fields(self, agree="[0, inf)", threshold="[0, inf)")

    @override
    def rule(self, task_vectors: TaskVectors) -> Rule:
        return partial(self._needed, self._thresholds(len(task_vectors.experts)))

    def _needed(self, thresholds: Tensor, _: str, delta: Delta) -> Tensor:
        taus = delta.dense()
        masks = tall_masks(taus, thresholds)
        return taus * (masks.sum(dim=0) >= self.agree)

    def _thresholds(self, experts: int) -> Tensor:
        given = torch.as_tensor(self.threshold, dtype=torch.float64).flatten()
        if len(given) not in (1, experts):
            raise ValueError(
                f"threshold has {len(given)} values for {experts} experts; give one, or one each"
            )
        return given.expand(experts)


def tall_masks(taus: Tensor, thresholds: Tensor) -> Tensor:
    """1[|tau_k| > threshold_k |sum_j tau_j - tau_k|], [K, *S] and [K] -> [K, *S] bool."""
    shaped = thresholds.to(taus).view(-1, *[1] * (taus.dim() - 1))
    return taus.abs() > shaped * (taus.sum(dim=0) - taus).abs()
