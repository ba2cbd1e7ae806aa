"""Isotropic merging: all directions of the merge get the same singular value.

Marczak et al., ICML 2025 (arXiv 2502.04959).

Legend: `K` experts, `m x n` a matrix, `c` common directions, `d` directions of one expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.matrices import PerMatrix
from trainmerge.preprocess.spectrum import polar, truncated
from trainmerge.system.ranges import check_fields


@dataclass(frozen=True)
class Iso(PerMatrix):
    """Iso-C and Iso-CTS: s U V^T, s the mean singular value.

    Iso-C (`common=1`): U, V are the singular vectors of sum_k tau_k. Iso-CTS keeps the leading ones, adds
    each expert's leading vectors off that subspace, and makes all of them orthonormal. Its merge is base +
    coefficient x sum of the results; the paper tunes the coefficient. Other parameters are divided by K.

    The paper has the sum only. Here an expert has its own directions, and of a common direction u v^T the
    share max(0, u^T tau_k v) among the experts. Directions whose singular value is zero (low-rank experts)
    are left out, of the mean too; the reference gives them the mean of all along arbitrary vectors. So if
    all directions together have rank r, s is min(m, n) / r times the reference's.

    Args:
        common: Fraction of min(m, n) directions in the common subspace, in [0, 1]; 0.8 in the paper.
        exclude: fnmatch patterns of matrices that are averaged.
    """

    common: float = 0.8
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_fields(self, common="[0, 1]")

    @override
    def matrices(self, taus: Tensor) -> Tensor:
        count = len(taus)
        common, own = _sizes(min(taus.shape[1:]), count, self.common)
        u, s, v = (part.double() for part in truncated(taus.sum(dim=0), common))
        parts = [truncated(_off(tau.double(), u), own) for tau in taus]
        left = polar(torch.cat([u, *(part[0] for part in parts)], dim=1))
        right = polar(torch.cat([v, *(part[2] for part in parts)], dim=1))
        values = torch.cat([s, *(part[1] for part in parts)])
        if not len(values):  # no expert changes the matrix
            return taus
        shares = torch.zeros(count, len(values), dtype=torch.float64)  # of each direction
        shares[:, : len(s)] = _shares(taus, u, v)
        first = len(s)
        for expert, part in enumerate(parts):
            shares[expert, first : first + len(part[1])] = 1.0
            first += len(part[1])
        return torch.stack([(values.mean() * (left * row) @ right.T).to(taus) for row in shares])


def _sizes(smaller: int, experts: int, share: float) -> tuple[int, int]:
    """Common directions, and those of one expert; together about `smaller`."""
    own = min(round((smaller - int(smaller * share + 1e-9)) / experts), smaller // experts)
    return smaller - own * experts, own


def _off(tau: Tensor, basis: Tensor) -> Tensor:
    return tau - basis @ (basis.T @ tau)


def _shares(taus: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Each expert's part of the common directions, [K, c], columns that sum to 1."""
    along = torch.stack([((u.T @ tau.double()) * v.T).sum(dim=1) for tau in taus]).clamp_min_(0)
    return along / along.sum(dim=0)
