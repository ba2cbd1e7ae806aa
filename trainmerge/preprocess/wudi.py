"""WUDI: the merge whose error lies outside of what each expert's linear layers read, in closed form.

Cheng et al., ICML 2025 (arXiv 2503.08099); spectral filters as in SWUDI and ASWUDI.

Legend: `K` experts, `m x n` a matrix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.preprocess import Preprocess
from trainmerge.task_vectors import TaskVectors


@dataclass(frozen=True)
class Wudi(Preprocess):
    """Of each matrix min_W sum_k |(W - tau_k) tau_k^T|^2 / |tau_k|^2, by a gradient flow that stops early.

    With C = sum_k tau_k^T tau_k / |tau_k|^2 = U diag(l) U^T, the flow from sum_k tau_k at time t is

        W = sum_k [tau_k - tau_k U f U^T + tau_k tau_k^T tau_k / |tau_k|^2 U (f / l) U^T],   f = 1 - exp(-l t)

    and the bracket is expert k's new task vector: its merge is base + sum of the results, coefficient 1.
    Parameters that are no matrices, and those in `exclude`, are divided by K. One eigendecomposition, n x n,
    a matrix, in float64.

    Args:
        time: t. The published run is 300; None is the adaptive filter, which needs no setting: f is 1 on the
            leading ceil((sum sqrt l)^2 / sum l) directions and 0 on the others (ASWUDI).
        keep: With `time`, f is 0 beyond the leading share of directions (SWUDI: time 1300, keep 0.65).
        exclude: fnmatch patterns of matrices that are averaged, embeddings say.
    """

    time: float | None = None
    keep: float = 1.0
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if (self.time is not None and self.time < 0) or not 0 < self.keep <= 1:
            raise ValueError(f"time must not be negative and keep in (0, 1], not {self.time}, {self.keep}")

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        for name, delta in task_vectors.deltas.items():
            taus = delta.dense()
            averaged = taus.dim() != 3 or any(fnmatchcase(name, pattern) for pattern in self.exclude)
            yield name, taus / len(taus) if averaged else self._matrices(taus)

    def _matrices(self, taus: Tensor) -> Tensor:
        norms = taus.double().square().sum(dim=(1, 2))
        if not norms.any():
            return taus
        scaled = taus.double() / norms.clamp_min(torch.finfo(torch.float64).tiny).sqrt()[:, None, None]
        scaled[norms == 0] = 0
        values, vectors = torch.linalg.eigh(sum(t.T @ t for t in scaled))
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        passed = self._filter(values)
        inverse = torch.where(passed > 0, passed / values.clamp_min(1e-300), 0.0)
        return torch.stack(
            [self._expert(t.double(), s, vectors, passed, inverse) for t, s in zip(taus, scaled, strict=True)]
        ).to(taus)

    def _filter(self, values: Tensor) -> Tensor:
        """The f of every direction, values in descending order."""
        solid = values > 1e-12 * values[0]  # the others are rounding
        order = torch.arange(len(values))
        if self.time is None:
            leading = ceil(float(values.sqrt().sum() ** 2 / values.sum()) - 1e-9)
            return (solid & (order < leading)).double()
        kept = order < ceil(self.keep * len(values) - 1e-9)
        return -torch.expm1(-values * self.time) * (solid & kept)

    def _expert(
        self, tau: Tensor, scaled: Tensor, vectors: Tensor, passed: Tensor, inverse: Tensor
    ) -> Tensor:
        target = scaled @ (scaled.T @ tau)  # tau tau^T tau / |tau|^2
        return tau - ((tau @ vectors) * passed) @ vectors.T + ((target @ vectors) * inverse) @ vectors.T
