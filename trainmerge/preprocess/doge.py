"""DOGE: change the merge to reduce each expert's loss, outside their shared subspace.

Wei et al., Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent, ICML 2025
(arXiv 2501.01230). peft's `projective_merge` is another formula under the same name (one inner product per
matrix, not one per row).

Legend: `K` experts, `m x n` a matrix, `k` directions of the shared subspace.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.kernels import accumulation_dtype
from trainmerge.preprocess.base import Preprocess
from trainmerge.preprocess.least_squares import closest
from trainmerge.preprocess.matrices import is_matrix
from trainmerge.preprocess.subspace import shared_subspace
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors, project_out
from trainmerge.task_vectors.roles import each_matrix
from trainmerge.task_vectors.top_k import cut_at

PAPER_STEPS, PAPER_RATE = 400, 1e-4


@dataclass(frozen=True)
class Doge(Preprocess):
    """New differences mask_k * (tau_k + D_k), where D minimises the row-wise gap in the complement of U.

        gap(D) = sum_k sum_row <tau_k, tau_k - sum_j l_j (tau_j + D_j)>^2,   l_k = eta / |tau_k|,   U^T D = 0

    U are the leading left singular vectors of all experts' leading ones; the mask keeps the largest entries
    of the original tau_k over all its parameters. Parameters that are not matrices, and those in `exclude`,
    keep the base's value, as in the paper.

    Args:
        eta: Scale of the task-aware coefficients l.
        subspace: U has floor(min(m, n) / subspace) columns; 6 in the paper, K for DOGE-AM.
        density: Fraction of entries that the mask keeps.
        solver: `cg` solves the constrained least squares in about 10 passes over a matrix, and D stays in the
            complement; `adam` is the paper's 400 steps on the projected gradient, an early stop, after which
            a fifth of D's norm lies outside it: then exclude embeddings, as the paper does. For full experts
            the two are 0.3 apart (relative, measured in the tests); `adam` is the published result. For
            low-rank experts the reference's U contains arbitrary directions, of singular value 0, and it
            divides by 0 where an expert changes nothing; here both are left out.
        separate: False is DOGE-TA: one D for all experts, and the results include l_k: coefficient 1. True
            gives the input of DOGE-AM: one D per expert, results without l_k, to be weighted by learned
            coefficients. It needs `adam`: without its early stop, D grows to about 1 / l times tau.
        exclude: fnmatch patterns of matrices that keep the base's value, embeddings say.
    """

    eta: float = 0.07
    subspace: int = 6
    density: float = 0.3
    solver: Literal["cg", "adam"] = "cg"
    separate: bool = False
    exclude: Sequence[str] = ()
    otherwise: ClassVar[str] = "left at the base's value"

    def __post_init__(self) -> None:
        check_fields(self, eta="(0, inf)", subspace="[1, inf)", density="(0, 1]")
        if self.separate and self.solver == "cg":
            raise ValueError("Doge(separate=True) needs solver='adam', whose early stop keeps D small")

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        matrices = {n: d for n, d in task_vectors.deltas.items() if self.applies_to(n, d)}
        cuts = [
            cut_at([(d.terms[k], d.base) for d in matrices.values()], self.density) if matrices else None
            for k in range(len(task_vectors.experts))
        ]
        for name, delta in task_vectors.deltas.items():
            if name not in matrices:
                yield name, torch.zeros(len(cuts), *delta.shape, dtype=accumulation_dtype(delta.base.dtype))
                continue
            taus = delta.dense()
            masks = [cut(tau) != 0 for cut, tau in zip(cuts, taus, strict=True) if cut]
            results = each_matrix(taus, delta.role, self._changed)
            for result, mask in zip(results, masks, strict=True):
                result *= mask
            yield name, results

    @override
    def applies_to(self, name: str, delta: Delta) -> bool:
        return is_matrix(name, delta, self.exclude)

    def _changed(self, taus: Tensor) -> Tensor:
        """The results of one matrix [K, m, n] before the mask."""
        weights = self._weights(taus)
        changed = taus + self._modification(taus, weights)
        return changed if self.separate else changed.mul_(weights[:, None, None])

    def _weights(self, taus: Tensor) -> Tensor:
        """l_k = eta / |tau_k|, [K]; 0 for an expert that does not change the matrix."""
        norms = taus.flatten(1).norm(dim=1)
        return torch.where(norms > 0, self.eta / norms.clamp_min(torch.finfo(taus.dtype).tiny), 0.0)

    def _modification(self, taus: Tensor, weights: Tensor) -> Tensor:
        """D [K, m, n], or [1, m, n] for all."""
        if not weights.any():
            return torch.zeros_like(taus)
        shares = weights if self.separate else weights.sum()[None]  # sum_j l_j D_j, or (sum_j l_j) D
        basis = shared_subspace(taus, min(taus.shape[1:]) // self.subspace)
        if self.solver == "adam":
            return _adam(taus, weights, shares, basis)
        return closest(taus, _gaps(taus, weights), basis)[None] / weights.sum()


def _gaps(taus: Tensor, weights: Tensor) -> Tensor:
    """<tau_k, tau_k - sum_j l_j tau_j> of every row, [K, m]."""
    merged = torch.einsum("k,kmn->mn", weights, taus)
    return torch.stack([(tau * (tau - merged)).sum(dim=1) for tau in taus])


def _adam(taus: Tensor, weights: Tensor, shares: Tensor, basis: Tensor) -> Tensor:
    """The paper's solver for one matrix: each step reads the task vectors twice."""
    gaps = _gaps(taus, weights)
    moves = torch.zeros(len(shares), *taus.shape[1:], dtype=taus.dtype)
    optimizer = torch.optim.Adam([moves], lr=PAPER_RATE, fused=True)
    for _ in range(PAPER_STEPS):
        total = torch.einsum("s,smn->mn", shares, moves)
        left = gaps - torch.einsum("kmn,mn->km", taus, total)
        slope = project_out(-2 * torch.einsum("km,kmn->mn", left, taus), basis)
        moves.grad = shares[:, None, None] * slope
        optimizer.step()
    return moves
