"""OPCM: experts are merged one after another, each projected off the previous merge.

Tang et al., NeurIPS 2025 (arXiv 2501.09522).

Legend: `K` experts, `m x n` a matrix, `r` its numerical rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Preprocess
from trainmerge.preprocess.matrices import is_matrix
from trainmerge.preprocess.spectrum import truncated
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors, dense_term
from trainmerge.task_vectors.roles import LINEAR, each_matrix


@dataclass(frozen=True)
class Opcm(Preprocess):
    """The experts in their order, each without its overlap with the sum of the previous ones.

    That is for weights of linear layers, as in the reference; embeddings, convolutions, norms and biases are
    summed.

    Its merge is base + sum of the results, coefficient 1, which has the mean norm of the experts' task
    vectors. Two passes: one for the norm of the sum over all parameters, one for the results. Thin
    factorisations instead of the reference's full ones, and the diagonal is removed inside the numerical rank
    only, so low-rank experts do not depend on an arbitrary basis.

    Args:
        alpha: Later experts are projected off the merge's leading directions, up to this share of the sum of
            its singular values.
        exclude: fnmatch patterns of matrices that are summed.
    """

    alpha: float = 0.5
    exclude: Sequence[str] = ()
    otherwise: ClassVar[str] = "summed, and scaled like the rest"

    def __post_init__(self) -> None:
        check_fields(self, alpha="[0, 1)")

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        scale = self._mean_norm(task_vectors) / self._norm_of_sum(task_vectors)
        for name, delta in task_vectors.deltas.items():
            yield name, self._projected(name, delta) * scale

    @override
    def applies_to(self, name: str, delta: Delta) -> bool:
        return delta.role in (*LINEAR, "") and is_matrix(name, delta, self.exclude)

    def _mean_norm(self, task_vectors: TaskVectors) -> float:
        squares = torch.zeros(len(task_vectors.experts), dtype=torch.float64)
        for delta in task_vectors.deltas.values():
            for k, term in enumerate(delta.terms):
                squares[k] += dense_term(term, delta.base).double().square().sum()
        return float(squares.sqrt().mean())

    def _norm_of_sum(self, task_vectors: TaskVectors) -> float:
        every = task_vectors.deltas.items()
        total = sqrt(sum(float(self._projected(n, d).sum(dim=0).double().square().sum()) for n, d in every))
        return total or 1.0  # all zero: any scale

    def _projected(self, name: str, delta: Delta) -> Tensor:
        """The K projected differences of one parameter, [K, *S], before the scale.

        The directions of a sum do not depend on its scale, so the reference's running rescaling is applied
        once at the end.
        """
        taus = delta.dense()
        return each_matrix(taus, delta.role, self._one_by_one) if self.applies_to(name, delta) else taus

    def _one_by_one(self, taus: Tensor) -> Tensor:
        """One matrix's differences [K, m, n]."""
        results = [taus[0]]
        merged = taus[0].clone()
        for tau in taus[1:]:
            results.append(self._without(merged, tau))
            merged += results[-1]
        return torch.stack(results)

    def _without(self, merged: Tensor, tau: Tensor) -> Tensor:
        """Remove from tau its part in the merge's leading subspaces and along its other directions."""
        u, s, v = truncated(merged, min(merged.shape))
        if not len(s):
            return tau
        split = int((s.cumsum(0) / s.sum() > self.alpha).int().argmax())
        leading = u[:, :split] @ (u[:, :split].T @ tau @ v[:, :split]) @ v[:, :split].T
        along = ((u * (tau @ v)).sum(dim=0)).clone()  # <u_i, tau v_i>
        along[:split] = 0
        return tau - leading - (u * along) @ v.T
