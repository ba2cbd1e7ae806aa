"""What of each task vector is kept: the largest entries, the middle ones, or random ones.

Legend: `K` models, `*S` shape of a parameter or of some rows of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainmerge.merging.group import Group
from trainmerge.task_vectors.draws import uniform
from trainmerge.task_vectors.top_k import Cut, cuts

FLAT = 1e-12


class Sparse(ABC):
    """The kept entries of one model's task vector, a piece at a time, in order."""

    @abstractmethod
    def __call__(self, tau: Tensor, name: str) -> Tensor:
        """A piece [*S] with the other entries set to zero."""


class Whole(Sparse):
    """Everything."""

    def __call__(self, tau: Tensor, name: str) -> Tensor:
        """The same piece."""
        del name
        return tau


class Largest(Sparse):
    """The largest magnitudes of the parameter: floor(density x size), as TIES trims, per parameter.

    With `outliers`, that many largest entries are dropped first (Model Breadcrumbs).
    """

    def __init__(self, group: Group, model: int, density: float, outliers: float = 0.0) -> None:
        size = group.delta.shape.numel()
        kept = int(density * size + 1e-6)
        top = int(min(outliers, 1 - density) * size + 1e-6)
        self._inner = self._cut(group, model, top) if top else None
        self._outer = self._cut(group, model, top + kept) if kept else None

    @staticmethod
    def _cut(group: Group, model: int, count: int) -> Cut:
        def magnitudes() -> Iterator[Tensor]:
            return (piece.taus[model].reshape(1, -1) for piece in group.pieces())

        (found,) = cuts(magnitudes, count)
        return found

    def __call__(self, tau: Tensor, name: str) -> Tensor:
        """The piece with smaller entries, and the outliers, set to zero."""
        del name
        if self._outer is None:
            return torch.zeros_like(tau)
        kept = self._outer(tau)
        return kept if self._inner is None else kept - self._inner(tau)


@dataclass(frozen=True)
class Random(Sparse):
    """Each entry with probability `density`, divided by it if `rescale` (DARE).

    The draws depend on seed, model and the piece's name only.
    """

    model: str
    density: float
    rescale: bool
    seed: int = 0

    def __call__(self, tau: Tensor, name: str) -> Tensor:
        """The piece with dropped entries set to zero."""
        if not self.density:
            return torch.zeros_like(tau)
        kept = tau * (uniform(tau.shape, self.seed, self.model, name) < self.density)
        return kept / self.density if self.rescale else kept


@dataclass(frozen=True)
class ByRank(Sparse):
    """Each entry with a probability that grows with its rank in its row, divided by it if `rescale` (DELLA).

    From density - epsilon for the row's smallest magnitude to density + epsilon for its largest (Deep et al.,
    arXiv 2406.11617).
    """

    model: str
    density: float
    epsilon: float
    rescale: bool
    seed: int = 0

    def __call__(self, tau: Tensor, name: str) -> Tensor:
        """The piece with dropped entries set to zero."""
        if self.density >= 1:
            return tau
        rows = tau.reshape(-1, tau.shape[-1]) if tau.dim() else tau.reshape(1, 1)
        ranks = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).to(tau.dtype)
        low, width = self.density - self.epsilon, 2 * self.epsilon
        keep = (low + ranks * (width / max(1, rows.shape[1] - 1))).view(tau.shape)
        kept = tau * (uniform(tau.shape, self.seed, self.model, name) < keep)
        return kept / keep if self.rescale else kept


@dataclass(frozen=True)
class Scaled(Sparse):
    """Another choice, with one factor per parameter."""

    inner: Sparse
    factor: float

    def __call__(self, tau: Tensor, name: str) -> Tensor:
        """The scaled piece."""
        return self.inner(tau, name) * self.factor


def norm_factor(group: Group, model: int, sparse: Sparse) -> float:
    """The factor that gives the kept entries the L1 norm of all; 1 if none is left."""
    whole = kept = 0.0
    for piece in group.pieces():
        tau = piece.taus[model]
        whole += float(tau.abs().sum(dtype=torch.float64))
        kept += float(sparse(tau, piece.name).abs().sum(dtype=torch.float64))
    return whole / kept if kept > FLAT else 1.0
