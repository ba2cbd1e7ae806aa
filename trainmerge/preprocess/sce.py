"""SCE: select entries by variance, calculate weights, erase minorities.

Wan et al., FuseChat (arXiv 2408.07990).

Legend: `K` experts, `*S` parameter shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Preprocess
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.top_k import count, cuts


@dataclass(frozen=True)
class Sce(Preprocess):
    """w_k m_k tau_k / sum_j w_j m_j, one parameter at a time; its merge is base + sum, coefficient 1.

    The `select` share of entries with the largest variance over the experts is used; w_k is expert k's share
    of their squares, and m_k marks its entries with the sign of the experts' sum. Where the sum is 0 the
    parameter's majority sign decides.

    Args:
        select: Fraction of entries to use, in (0, 1].
    """

    select: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, select="(0, 1]")

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        for name, delta in task_vectors.deltas.items():
            yield name, self._fused(delta.dense())

    def _fused(self, taus: Tensor) -> Tensor:
        """One parameter's differences [K, *S]."""
        if self.select < 1:
            taus *= self._selected(taus)
        shape = (-1, *[1] * (taus.dim() - 1))
        energy = taus.double().square().reshape(len(taus), -1).sum(dim=1)
        sign = taus.sum(dim=0).sign_()
        balance = float(sign.sum(dtype=torch.float64))
        sign = torch.where(sign == 0, 1.0 if balance >= 0 else -1.0, sign)
        weights = energy.to(taus).view(shape) * (taus.sign() == sign)
        divisor = weights.sum(dim=0)
        return taus * weights / torch.where(divisor > 0, divisor, 1.0)

    def _selected(self, taus: Tensor) -> Tensor:
        """The entries of large variance, [*S] bool."""
        variance = (taus - taus.mean(dim=0)).square_().mean(dim=0)
        (cut,) = cuts(lambda: [variance.reshape(1, -1)], count(variance.numel(), self.select))
        return cut(variance) != 0
