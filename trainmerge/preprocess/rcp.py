"""RCP-Merging: add a domain expert's change only where it does not harm the other expert.

Yang et al., AAAI 2026 (arXiv 2508.03140).

Legend: `*S` parameter shape, `N` the domain's examples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Calibrator, Informed
from trainmerge.preprocess.fisher import squares
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import TaskVectors


@dataclass(frozen=True)
class Rcp(Informed):
    """The whole task vector of `keep`, and the entries of `add`'s that most of its examples vote for.

        vote_n = +1 if g_n * W_add + weight * F * (W_keep - W_add)^2 <= 0, else -1

    g_n is the gradient of `add`'s language-model loss on its example n, F the mean of (gradient * W)^2 of
    `keep` on its own. An entry passes if the votes' sum is above 0. Two language models; the merge is
    base + sum of the results, coefficient 1.

    Args:
        keep: The expert whose ability is protected (the paper's reasoning model).
        add: The domain expert.
        weight: Weight of the protection, lambda.
    """

    keep: str
    add: str
    weight: float = 1000.0

    def __post_init__(self) -> None:
        check_fields(self, weight="[0, inf)")

    @override
    def informed(self, task_vectors: TaskVectors, calibrator: Calibrator) -> Iterator[tuple[str, Tensor]]:
        if sorted(task_vectors.experts) != sorted([self.keep, self.add]):
            raise ValueError(
                f"Rcp merges two experts, keep={self.keep!r} and add={self.add!r}; these are "
                f"{list(task_vectors.experts)}"
            )
        kept, added = (task_vectors.experts.index(name) for name in (self.keep, self.add))
        guard = calibrator.keep(squares(self._scaled(task_vectors, kept, calibrator)))
        votes: dict[str, Tensor] = {}
        for scaled in self._scaled(task_vectors, added, calibrator):
            for name, sensitivity in scaled.items():
                taus = task_vectors.deltas[name].dense()
                cost = sensitivity + self.weight * guard[name] * (taus[kept] - taus[added]).square()
                vote = 1 - 2 * (cost > 0).int()
                votes[name] = votes[name].add_(vote) if name in votes else vote
        for name, delta in task_vectors.deltas.items():
            taus = delta.dense()
            if name in votes:
                taus[added] *= votes[name] > 0
            yield name, taus

    def _scaled(
        self, task_vectors: TaskVectors, expert: int, calibrator: Calibrator
    ) -> Iterator[dict[str, Tensor]]:
        """Gradient times weight, example by example."""
        for gradient in calibrator.gradients(expert, sampled=False):
            yield {
                name: slope.float() * _weight(task_vectors, name, expert) for name, slope in gradient.items()
            }


def _weight(task_vectors: TaskVectors, name: str, expert: int) -> Tensor:
    delta = task_vectors.deltas[name]
    return delta.base.to(torch.float32) + delta.dense()[expert]
