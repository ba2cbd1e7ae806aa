"""DARE: drop entries at random and rescale the rest.

Yu et al., ICML 2024 (arXiv 2311.03099).

Legend: `K` experts, `*S` shape of a parameter or of some rows of it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.piecewise import Piecewise, Rule
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.draws import uniform

LARGE = 0.005  # mean |difference|: the paper's experts, which tolerate dropping 90%, are below it
SAMPLE = 1 << 12  # entries sampled per parameter


@dataclass(frozen=True)
class Dare(Piecewise):
    """Keep each entry with probability 1 - drop, and divide it by that: unbiased, but noisy.

    Then average (coefficients 1 / K), task arithmetic, or `Ties` after it. The random draws depend only on
    seed, expert and parameter name (and rows, if it is large), so the result is the same in any order and
    with any number of processes. A warning names experts whose differences are too large for this noise.

    Args:
        drop: Probability of dropping, in [0, 1). The paper's 0.9 needs small differences.
        seed: Seed of the random draws.
    """

    drop: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, drop="[0, 1)")

    @override
    def rule(self, task_vectors: TaskVectors) -> Rule:
        if self.drop > 0.5:
            self._warn_of_large(task_vectors)
        return partial(self._dropped, task_vectors.experts)

    def _warn_of_large(self, task_vectors: TaskVectors) -> None:
        """Estimated from the first rows of every parameter."""
        sums, count = torch.zeros(len(task_vectors.experts), dtype=torch.float64), 0
        for delta in task_vectors.deltas.values():
            rows = slice(0, max(1, SAMPLE // max(1, delta.shape[1:].numel())))
            taus = (delta.rows(rows) if delta.shape else delta).dense()
            sums += taus.abs().reshape(len(taus), -1).sum(dim=1, dtype=torch.float64).cpu()
            count += taus[0].numel()
        means = (sums / max(1, count)).tolist()
        large = {e: f"{m:.2g}" for e, m in zip(task_vectors.experts, means, strict=True) if m > LARGE}
        if large:
            warnings.warn(
                f"Dare: mean |difference| is {large}, and with drop {self.drop} the remaining entries grow "
                f"{1 / (1 - self.drop):.3g} times; above {LARGE} that hurts (arXiv 2311.03099): drop less",
                stacklevel=2,
            )

    def _dropped(self, experts: Sequence[str], name: str, delta: Delta) -> Tensor:
        kept = [
            tau * self._mask(tau, expert, name) / (1 - self.drop)
            for tau, expert in zip(delta.dense(), experts, strict=True)
        ]
        return torch.stack(kept)

    def _mask(self, tau: Tensor, expert: str, name: str) -> Tensor:
        return uniform(tau.shape, self.seed, expert, name) >= self.drop
