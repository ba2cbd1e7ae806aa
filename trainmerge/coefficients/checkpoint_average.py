"""Averages of one run's checkpoints in their order: equal weights, exponential ones, or a schedule's decay.

Warmup-stable-merge (WSM): Tian et al., ICLR 2026 (arXiv 2507.17634).

Legend: `K` experts, which are the run's checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi, sqrt
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.coefficients.layout import Layout
from trainmerge.coefficients.presets import Preset
from trainmerge.system.ranges import check_fields

Schedule = Literal["equal", "ema", "cosine", "sqrt"]


@dataclass(frozen=True)
class CheckpointAverage(Preset):
    """Weights of the checkpoints theta_0 ... theta_k of one run, in the recipe's order; they sum to 1.

    A sum of c_j theta_j is the last stretch of the run with its updates scaled by a decay
    1 >= w_1 >= ... >= w_k >= 0, where c_0 = 1 - w_1, c_j = w_j - w_(j + 1), c_k = w_k (WSM). With t =
    i / (k + 1):

        equal   w_i = 1 - t: the simple average, 1 / (k + 1) each, is linear decay
        cosine  w_i = (1 + cos(pi t)) / 2
        sqrt    w_i = 1 - sqrt(t)
        ema     c_j = (1 - decay) decay^(k - j), and decay^k for the first: an exponential moving average

    At which points the paper samples its curves we did not find; these are ours.

    Args:
        schedule: One of these.
        decay: Of `ema`.
        from_base: The base is the first checkpoint, so the experts are the later ones.
    """

    schedule: Schedule = "equal"
    decay: float = 0.9
    from_base: bool = False

    def __post_init__(self) -> None:
        check_fields(self, decay="[0, 1)")

    @override
    def __call__(self, experts: Sequence[str], layout: Layout) -> Tensor:
        """[K, 1]."""
        weights = self.weights(len(experts) + self.from_base)
        return torch.tensor(weights[self.from_base :], dtype=torch.float64).float()[:, None]

    def weights(self, count: int) -> list[float]:
        """Of `count` checkpoints, the earliest first."""
        last = count - 1
        if self.schedule == "ema":
            return [self.decay**last, *((1 - self.decay) * self.decay ** (last - j) for j in range(1, count))]
        curve = [1.0, *(self._left(i / count) for i in range(1, count)), 0.0]
        return [before - after for before, after in pairwise(curve)]

    def _left(self, t: float) -> float:
        """The decay at a share t of the stretch."""
        if self.schedule == "cosine":
            return (1 + cos(pi * t)) / 2
        return 1 - (sqrt(t) if self.schedule == "sqrt" else t)
