"""OptMerge (WUDI v2): WUDI with each expert's leading part as target, along its leading directions.

Wei et al., ICLR 2026 (arXiv 2505.19892).

Legend: `K` experts, `m x n` a matrix, `r` leading singular triples of one expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.matrices import PerMatrix
from trainmerge.preprocess.spectrum import square_norm, truncated, wide_rows
from trainmerge.system.ranges import check_fields

PUBLISHED = {"sum": 300.0, "mean": 0.6}  # the time of the published runs, by their start


@dataclass(frozen=True)
class OptMerge(PerMatrix):
    """Of each matrix min_W sum_k |(W - t_k) V_k S_k|^2 / |tau_k|^2, by a gradient flow that stops early.

    tau_k = U_k S_k V_k^T with its r = floor(min(m, n) / K) leading triples; t_k is the leading part of
    tau_k - mean, plus the mean. The flow starts from the sum (as published for full experts) or the mean (for
    low-rank ones), and runs to `time`; the paper takes 300 steps of Adam or SGD instead. As in `Wudi`, every
    expert's part of the solution is its new task vector: coefficient 1. Parameters that are not matrices, and
    those in `exclude`, are divided by K.

    Args:
        time: The time at which the flow stops; infinity gives the minimum. By default 300 from the sum, 0.6
            from the mean: 2 x rate x steps / (1 - momentum) of the published SGD, 1e-4, 300 and 0.9.
        start: Its starting point.
        exclude: fnmatch patterns of matrices that are averaged, embeddings say.
    """

    time: float | None = None
    start: Literal["sum", "mean"] = "sum"
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_fields(self, time="[0, inf]")

    @override
    def matrices(self, taus: Tensor) -> Tensor:
        rank = max(1, min(taus.shape[1:]) // len(taus))
        seen = [_seen(tau, rank) for tau in taus]
        _, roots, vectors = truncated(torch.cat(seen), sum(len(directions) for directions in seen))
        if not len(roots):
            return taus
        values, share = roots.square(), 1.0 if self.start == "sum" else 1 / len(taus)
        time = PUBLISHED[self.start] if self.time is None else self.time
        passed = -torch.expm1(-values * time)
        mean, results = taus.mean(dim=0), []
        for tau, own in zip(taus, seen, strict=True):
            towards = own.T @ (own @ vectors) * (passed / values)  # V S^2 V^T / |tau|^2 U (f / l), [n, r]
            left, sizes, right = truncated(tau - mean, rank)
            lead = sizes.double()[:, None] * (right.double().T @ towards)
            blocks = zip(*(wide_rows(part) for part in (tau, mean, left)), strict=True)
            moved = (u @ lead + m @ towards - share * (t @ vectors) * passed for t, m, u in blocks)
            rows = zip(wide_rows(tau), moved, strict=True)
            results.append(torch.cat([(share * t + move @ vectors.T).to(taus) for t, move in rows]))
        return torch.stack(results)


def _seen(tau: Tensor, rank: int) -> Tensor:
    """S V^T / |tau| of the leading triples, [r, n] float64; r is 0 if the expert does not change it."""
    _, s, v = (part.double() for part in truncated(tau, rank))
    return (v * s).T / square_norm(tau).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
