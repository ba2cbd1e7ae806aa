"""WUDI: the merge with the least error on the inputs of each expert's linear layers, in closed form.

Cheng et al., ICML 2025 (arXiv 2503.08099); spectral filters as in SWUDI and ASWUDI.

Legend: `K` experts, `m x n` a matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.matrices import PerMatrix
from trainmerge.preprocess.spectrum import input_directions, moment_times, square_norm, wide_rows
from trainmerge.system.ranges import check_fields


@dataclass(frozen=True)
class Wudi(PerMatrix):
    """Of each matrix min_W sum_k |(W - tau_k) tau_k^T|^2 / |tau_k|^2, by a gradient flow that stops early.

    With C = sum_k tau_k^T tau_k / |tau_k|^2 = U diag(l) U^T, the flow from sum_k tau_k at time t is

        W = sum_k [tau_k - tau_k U f U^T + tau_k tau_k^T tau_k / |tau_k|^2 U (f / l) U^T],   f = 1 - exp(-l t)

    and the bracket is expert k's new task vector: its merge is base + sum of the results, coefficient 1.
    Parameters that are not matrices, and those in `exclude`, are divided by K. Per matrix one
    eigendecomposition, n x n, in float64 (K m x K m where that is less), and a few n x n products per block
    of rows.

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
        check_fields(self, time="[0, inf]", keep="(0, 1]")

    @override
    def matrices(self, taus: Tensor) -> Tensor:
        values, vectors = input_directions(taus)
        if not len(values):
            return taus
        passed = self._filter(values, taus.shape[2])
        seen, passed = vectors[:, passed > 0], passed[passed > 0]
        inverse = passed / values[: len(passed)]
        return torch.stack([_expert(tau, seen, passed, inverse) for tau in taus])

    def _filter(self, values: Tensor, width: int) -> Tensor:
        """f of every direction, [r], for eigenvalues in descending order: once it is 0 it stays 0."""
        order = torch.arange(len(values))
        if self.time is None:
            leading = ceil(float(values.sqrt().sum() ** 2 / values.sum()) - 1e-9)
            return (order < leading).double()
        return -torch.expm1(-values * self.time) * (order < ceil(self.keep * width - 1e-9))


def _expert(tau: Tensor, seen: Tensor, passed: Tensor, inverse: Tensor) -> Tensor:
    """tau - tau U f U^T + tau M U (f / l) U^T with M = tau^T tau / |tau|^2, some rows after the others."""
    moment = moment_times(tau, seen) / square_norm(tau).clamp_min(torch.finfo(torch.float64).tiny)
    taken = seen * passed - moment * inverse  # [n, r]
    if tau.shape[0] >= tau.shape[1]:
        every = taken @ seen.T
        return torch.cat([(rows - rows @ every).to(tau.dtype) for rows in wide_rows(tau)])
    return torch.cat([(rows - (rows @ taken) @ seen.T).to(tau.dtype) for rows in wide_rows(tau)])
