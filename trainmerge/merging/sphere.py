"""Inner products of models, and rules that combine them.

Legend: `K` models, `*S` shape of a parameter or of some rows of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainmerge.merging.group import Group, Piece, Rule
from trainmerge.task_vectors.sphere import TINY


def group_gram(group: Group, tau: bool) -> Tensor:
    """Inner products of the models, or of their task vectors, [K, K] float64."""
    total = torch.zeros(len(group.names), len(group.names), dtype=torch.float64)
    for piece in group.pieces():
        rows = (piece.taus if tau else piece.weights).double().flatten(1)
        total += rows @ rows.T
    return total


def weighted_sum_rule(coefficients: Tensor, based: bool = False) -> Rule:
    """sum_k c_k W_k, or base + sum_k c_k tau_k."""
    shares = coefficients.tolist()

    def rule(piece: Piece) -> Tensor:
        if not based:
            return weighted(piece.weights, shares)
        assert piece.base is not None
        return piece.base + weighted(piece.taus, shares)

    return rule


def weighted(rows: Tensor, shares: Sequence[float]) -> Tensor:
    """sum_k shares[k] rows[k], [K, *S] -> [*S], in order."""
    total = rows[0] * shares[0]
    for row, share in zip(rows[1:], shares[1:], strict=True):
        total.add_(row, alpha=share)
    return total


def nonzero(total: float, group: Group, key: str) -> float:
    """A sum of weights, to divide by.

    Raises:
        ValueError: it is 0.
    """
    if abs(total) < TINY:
        raise ValueError(f"{group.place.name}: the models' `{key}` add up to 0 and cannot be normalised")
    return total
