"""Pico: output directions that the adapters' B share are scaled down before another method merges them.

Tang and Yang, "Crowded in B-Space", arXiv 2604.16826; formulas as a public reimplementation states them. It
rescales B alone because its adapters share A; here the merged update is rescaled, as the abstract says.

Legend: `K` experts, `m x n` a matrix, `r` directions that all B together have.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.kernels import Difference
from trainmerge.preprocess.base import Preprocess
from trainmerge.preprocess.core_space import Around, factors_of, matrices_of, turned_role
from trainmerge.preprocess.spectrum import truncated
from trainmerge.preprocess.ties import Ties
from trainmerge.task_vectors.delta import Delta, TaskVectors, dense_term


@dataclass(frozen=True)
class Pico(Around):
    """Apply `method` to calibrated experts, and give the merge the experts' mean norm, matrix by matrix.

        [B_1 ... B_K] = U S V^T,   s_j = S_j^2 / sum S^2,   a_j = 1 / (1 + (K - 1) s_j)
        tau'_k = gamma method((I + U (a - 1) U^T) tau)_k,
        gamma = mean_k |tau_k| / |sum_k method(...)_k|

    so that base + sum of the results, coefficient 1, is the merge. A direction that holds all of B's energy
    is divided by K. For full experts the differences take the place of B. B's energies depend on how an
    adapter divides its update between B and A. Parameters that are no matrices go to the method, unscaled.

    Args:
        method: A method without data, after which the experts are summed; `Ties(density=1, merge="mean")` is
            TIES without trimming. Its own scale does not matter.
    """

    method: Preprocess = field(default_factory=lambda: Ties(0.3, merge="mean"))

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        deltas: dict[str, Delta] = {}
        norms: dict[str, list[float]] = {}
        for name, delta in task_vectors.deltas.items():
            if not delta.matrices:
                deltas[name] = delta
                continue
            norms[name] = []
            for number, part in enumerate(matrices_of(delta)):
                taus = torch.stack([dense_term(term, part.base) for term in part.terms])
                norms[name].append(float(taus.double().flatten(1).norm(dim=1).mean()))
                calibrated = tuple(Difference(tau) for tau in self._calibrated(part, taus))
                key, role = f"{name}#{number}", turned_role(delta)
                deltas[key] = Delta(torch.zeros_like(taus[0]), calibrated, role)
        results = iter(self.method(TaskVectors(task_vectors.experts, deltas)))
        for name, delta in task_vectors.deltas.items():
            if name not in norms:
                yield name, next(results)[1]
                continue
            parts = [_rescaled(next(results)[1], norm) for norm in norms[name]]
            taus = torch.stack(parts, dim=1)
            turned = taus.mT if delta.role == "transposed" else taus
            yield name, turned.reshape(len(taus), *delta.shape).contiguous()

    def _calibrated(self, part: Delta, taus: Tensor) -> Tensor:
        """S tau_k of one matrix, [K, m, n]."""
        stacked = torch.cat([factors_of(term, part.base)[0].double() for term in part.terms], dim=1)
        u, values, _ = truncated(stacked, min(stacked.shape))
        shares = values.square() / values.square().sum().clamp_min(1e-300)
        change = u * (1 / (1 + (len(taus) - 1) * shares) - 1)  # [m, r]
        return torch.stack([tau + (change @ (u.T @ tau.double())).to(tau) for tau in taus])


def _rescaled(results: Tensor, norm: float) -> Tensor:
    """One matrix's results [K, m, n], whose sum has this norm."""
    size = sqrt(float(results.sum(0).double().square().sum()))
    return results * (norm / size) if size > 0 else results
