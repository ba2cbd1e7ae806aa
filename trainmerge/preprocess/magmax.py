"""MagMax: each entry from the expert that changed it most.

Marczak et al., ECCV 2024 (arXiv 2407.06322).

Legend: `K` experts, `*S` shape of a parameter or of some rows of it.
"""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.piecewise import Piecewise, Rule
from trainmerge.task_vectors.delta import Delta, TaskVectors


@dataclass(frozen=True)
class MagMax(Piecewise):
    """tau_k where |tau_k| is the largest of all experts, else 0.

    Its merge is base + coefficient x sum of the results, 0.5 in the paper. Experts with the same largest
    magnitude share the entry equally; in the reference the last one has it.
    """

    @override
    def rule(self, task_vectors: TaskVectors) -> Rule:
        del task_vectors
        return _largest


def _largest(_: str, delta: Delta) -> Tensor:
    """A piece's new differences, [K, *S]."""
    taus = delta.dense()
    sizes = taus.abs()
    largest = sizes == sizes.amax(dim=0)
    return taus.mul_(largest).div_(largest.sum(dim=0))
