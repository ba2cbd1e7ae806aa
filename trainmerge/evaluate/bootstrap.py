"""The paired bootstrap: whether a difference between models exceeds the noise of the test examples.

All models are scored on the same examples, so each draw resamples the same examples for all of them, task by
task (Efron and Tibshirani, 1993, chapter 16; Koehn, EMNLP 2004).

Legend: `N` examples of a task, `R` rows (models), `D` draws.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 2000
BLOCK = 100  # draws at a time: memory is this many times the examples


class ScoreDifference(NamedTuple):
    """A row's difference from the best in accuracy or log-perplexity, with its 95% interval."""

    worse_by: float
    low: float
    high: float

    @property
    def noise(self) -> bool:
        """Whether 0 is in the interval: the difference is not significant."""
        return self.low <= 0 <= self.high


def score_differences(
    outcomes: Mapping[str, Sequence[Tensor]], best: int, sign: int, draws: int = DRAWS, seed: int = 0
) -> list[ScoreDifference]:
    """Every row's difference from row `best` in the mean over tasks.

    Args:
        outcomes: Task -> R tensors [N, 2]: each example's contribution to the sum and the count whose ratio
            is the score.
        best: The reference row.
        sign: 1 where a higher ratio is better, -1 where a lower one is.
        draws: Number of bootstrap draws.
        seed: Seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    told = torch.stack([torch.stack([_ratio(rows.sum(0)) for rows in task]) for task in outcomes.values()])
    drawn = torch.stack([_draw(torch.stack(list(task)), draws, generator) for task in outcomes.values()])
    mean, means = sign * told.mean(0), sign * drawn.mean(0)  # [R], [R, D]
    worse, spread = mean[best] - mean, means[best] - means
    low, high = spread.quantile(0.025, dim=1), spread.quantile(0.975, dim=1)
    return [ScoreDifference(*row) for row in torch.stack([worse, low, high], dim=1).tolist()]


def _draw(rows: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Ratios [R, D] of outcomes [R, N, 2] over examples drawn with replacement, the same for all rows."""
    count, ratios = rows.shape[1], []
    for first in range(0, draws, BLOCK):
        chosen = torch.randint(count, (min(BLOCK, draws - first), count), generator=generator)
        times = torch.zeros(chosen.shape, dtype=torch.float64)
        times.scatter_add_(1, chosen, torch.ones_like(times))
        ratios.append(_ratio(torch.einsum("dn,rnx->rdx", times, rows)))
    return torch.cat(ratios, dim=1)


def _ratio(sums: Tensor) -> Tensor:
    return sums[..., 0] / sums[..., 1]
