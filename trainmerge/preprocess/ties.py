"""TIES: trim small values, elect a sign, keep what agrees with it.

Yadav et al., NeurIPS 2023 (arXiv 2306.01708).

Legend: `K` experts, `*S` parameter shape.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.preprocess import Preprocess
from trainmerge.preprocess.select import cut_at
from trainmerge.task_vectors import TaskVectors, dense_term


@dataclass(frozen=True)
class Ties(Preprocess):
    """Trim, elect, and keep the agreeing entries of each expert.

    The paper's merge is base + coefficient x sum of the results: coefficient 1 for `mean`, which
    divides each entry by the number of experts that agree there, and 0.3 for `sum`, which does not
    (AdaMerging++ learns its coefficients on `sum`).

    Args:
        density: Fraction of entries that trimming keeps, in (0, 1].
        scope: `global` ranks an expert's entries over all its parameters, as the paper and its code do;
            `parameter` within each, as mergekit does.
        merge: `sum` or `mean` over the agreeing experts.
    """

    density: float = 0.2
    scope: Literal["global", "parameter"] = "global"
    merge: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], not {self.density}")

    @property
    @override
    def entrywise(self) -> bool:
        return self.scope == "global"

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        majority = cache(lambda: self._majority(task_vectors))
        for name, trimmed in self._trimmed(task_vectors):
            yield name, disjoint(trimmed, majority, self.merge)

    def _trimmed(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's K trimmed differences, [K, *S]."""
        experts = range(len(task_vectors.experts))
        if self.scope == "global":
            every = task_vectors.deltas.values()
            cuts = [cut_at([(d.terms[k], d.base) for d in every], self.density) for k in experts]
        for name, delta in task_vectors.deltas.items():
            if self.scope == "parameter":
                cuts = [cut_at([(term, delta.base)], self.density) for term in delta.terms]
            rows = [cut(dense_term(term, delta.base)) for cut, term in zip(cuts, delta.terms, strict=True)]
            yield name, torch.stack(rows)

    def _majority(self, task_vectors: TaskVectors) -> Tensor:
        """The sign that most elected entries have: it decides where the sum of all experts is zero."""
        return torch.stack([t.sum(dim=0).sign().sum() for _, t in self._trimmed(task_vectors)]).sum().sign()


def disjoint(trimmed: Tensor, majority: Callable[[], Tensor], merge: Literal["sum", "mean"]) -> Tensor:
    """Keep the entries of `trimmed` [K, *S] that have the elected sign; for `mean`, share them out."""
    sign = trimmed.sum(dim=0).sign()
    if bool(((sign == 0) & (trimmed != 0).any(dim=0)).any()):
        sign = torch.where(sign == 0, majority().to(sign), sign)
    agreeing = trimmed * (trimmed.sign() == sign)
    if merge == "sum":
        return agreeing
    return agreeing / (agreeing != 0).sum(dim=0).clamp(min=1)
