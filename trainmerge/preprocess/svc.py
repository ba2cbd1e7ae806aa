"""Singular value calibration: directions that several experts share are not counted several times.

Li et al., ICML 2026 (arXiv 2602.05536).

Legend: `K` experts, `m x n` a matrix, `r` singular directions of the merge.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Preprocess
from trainmerge.preprocess.matrices import is_matrix
from trainmerge.preprocess.spectrum import truncated
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.roles import each_matrix

NOTHING = 1e-12  # squared response, of the largest, below which an expert does not respond in a direction


@dataclass(frozen=True)
class Svc(Preprocess):
    """Calibrate the merge M = scale sum_k tau_k: its r-th singular value is multiplied by g_r.

        g_r = K / sum_k max(floor, s_rk),   s_rk = <u_r^T M, u_r^T tau_k> / |u_r^T tau_k|^2

    s_rk above 1 says that the merge counts expert k's part along u_r more than once. Expert k's result is
    scale (tau_k + U (G - 1) U^T tau_k), so that base + sum of the results, coefficient 1, is the calibrated
    merge. It also calibrates the results of another method: name that first, and here its coefficient as
    `scale`. An expert without a part along u_r has s = 0. Other parameters are scaled.

    Args:
        scale: Coefficient of the merge that is calibrated; 0.3 (task arithmetic) in the paper's code.
        floor: alpha; larger values shrink more. The paper's code has 0.1, and 1 / K for task arithmetic.
        exclude: fnmatch patterns of matrices that are not calibrated.
    """

    scale: float = 0.3
    floor: float = 0.1
    exclude: Sequence[str] = ()
    otherwise: ClassVar[str] = "scaled only"

    def __post_init__(self) -> None:
        check_fields(self, scale="(0, inf)", floor="(0, inf)")

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        for name, delta in task_vectors.deltas.items():
            taus = delta.dense().mul_(self.scale)
            calibrated = self.applies_to(name, delta)
            yield name, each_matrix(taus, delta.role, self._calibrated) if calibrated else taus

    @override
    def applies_to(self, name: str, delta: Delta) -> bool:
        return is_matrix(name, delta, self.exclude)

    def _calibrated(self, taus: Tensor) -> Tensor:
        """One matrix's differences [K, m, n], scaled, which add up to the merge."""
        merged = taus.sum(dim=0).double()
        u = truncated(merged, min(merged.shape))[0]  # [m, r]
        response = u.T @ merged  # [r, n]
        along = [u.T @ tau.double() for tau in taus]
        factors = torch.stack([self._overlap(response, part) for part in along]).mean(dim=0).reciprocal()
        change = u * (factors - 1)
        return torch.stack([tau + (change @ part).to(tau) for tau, part in zip(taus, along, strict=True)])

    def _overlap(self, response: Tensor, part: Tensor) -> Tensor:
        """max(floor, s) of one expert along each direction, [r]; `part` is scaled."""
        squares = part.square().sum(dim=1)
        solid = squares > NOTHING * squares.max() if squares.numel() else squares > 0
        products = self.scale * (response * part).sum(dim=1)
        s = torch.where(solid, products / squares.where(solid, 1.0), 0.0)
        return s.clamp_min(self.floor)
