"""OptMerge (WUDI v2): WUDI towards each expert's leading part, judged by its leading directions.

Wei et al., ICLR 2026 (arXiv 2505.19892).

Legend: `K` experts, `m x n` a matrix, `r` leading singular triples of one expert.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.preprocess import Preprocess
from trainmerge.preprocess.tsv import truncated
from trainmerge.task_vectors import TaskVectors


@dataclass(frozen=True)
class OptMerge(Preprocess):
    """Of each matrix min_W sum_k |(W - t_k) V_k S_k|^2 / |tau_k|^2, by a gradient flow that stops early.

    tau_k = U_k S_k V_k^T with its r = floor(min(m, n) / K) leading triples; t_k is the leading part of
    tau_k - mean, plus the mean. The flow starts from the sum (as published for full experts) or the mean (for
    low-rank ones), and runs to `time`; the paper takes 300 steps of Adam or SGD instead. As in `Wudi`, every
    expert's part of the answer is its new task vector: coefficient 1. Parameters that are no matrices, and
    those in `exclude`, are divided by K.

    Args:
        time: When the flow stops; infinity is the minimum.
        start: Where it starts.
        exclude: fnmatch patterns of matrices that are averaged, embeddings say.
    """

    time: float = 300.0
    start: Literal["sum", "mean"] = "sum"
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.time < 0:
            raise ValueError(f"time must not be negative, not {self.time}")

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        for name, delta in task_vectors.deltas.items():
            taus = delta.dense()
            averaged = taus.dim() != 3 or any(fnmatchcase(name, pattern) for pattern in self.exclude)
            yield name, taus / len(taus) if averaged else self._matrices(taus.double()).to(taus)

    def _matrices(self, taus: Tensor) -> Tensor:
        K, rank = len(taus), max(1, min(taus.shape[1:]) // len(taus))
        norms = taus.square().sum(dim=(1, 2))
        if not norms.any():
            return taus
        mean = taus.mean(dim=0)
        targets = torch.stack([_leading(tau - mean, rank) + mean for tau in taus])
        seen = torch.stack([_moment(tau, rank) for tau in taus])  # V S^2 V^T / |tau|^2
        values, vectors = torch.linalg.eigh(seen.sum(dim=0))
        solid = values > 1e-12 * values[-1]
        passed = -torch.expm1(-values * self.time) * solid
        inverse = torch.where(solid, passed / values.clamp_min(1e-300), 0.0)
        starts = taus if self.start == "sum" else taus / K
        kept = starts - ((starts @ vectors) * passed) @ vectors.T
        towards = ((targets @ seen @ vectors) * inverse) @ vectors.T
        merged: Tensor = kept + towards
        return merged


def _leading(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = truncated(matrix, rank)
    return (u * s) @ v.T


def _moment(tau: Tensor, rank: int) -> Tensor:
    """What the leading directions weigh, [n, n]; 0 for an expert that leaves the matrix alone."""
    _, s, v = truncated(tau, rank)
    return (v * s.square()) @ v.T / tau.square().sum().clamp_min(torch.finfo(tau.dtype).tiny)
