"""Localize-and-Stitch without data: each expert's largest entries, averaged where several experts have one.

He et al., TMLR 2025 (arXiv 2408.13656), its dataless form.

Legend: `K` experts, `*S` shape of a parameter or of some rows of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.piecewise import Piecewise, Rule
from trainmerge.preprocess.ties import total, trim_, trimming
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.top_k import Limit


@dataclass(frozen=True)
class LocalizeAndStitch(Piecewise):
    """m_k tau_k / max(1, sum_j m_j), m_k the mask of expert k's largest entries over all parameters.

    Its merge is base + sum of the results, coefficient 1. There is no election of signs. The count is exact;
    the reference drops the smallest entry of each mask. An entry that an expert did not change is in no mask.

    Args:
        density: Fraction of entries in each mask, in (0, 1]; 0.05 in the paper for language, 0.1 for vision.
    """

    density: float = 0.05

    def __post_init__(self) -> None:
        check_fields(self, density="(0, 1]")

    @override
    def rule(self, task_vectors: TaskVectors) -> Rule:
        return Stitched({name: row for name, row, _ in trimming(task_vectors, self.density, "global")})


@dataclass(frozen=True)
class Stitched:
    """The rule after its first pass: each piece's limits."""

    limits: Mapping[str, tuple[Limit, ...]]

    def __call__(self, name: str, delta: Delta) -> Tensor:
        """A piece's new differences, [K, *S]."""
        kept = trim_(delta.dense(), self.limits[name])
        return kept.div_(total(kept.sign().abs_()).clamp_min_(1))
