"""Points on the sphere through several models' weights, as coefficients of the models.

Each such point is a combination of the models, so one pass computes their inner products, float64, and the
geometry is K numbers.

Legend: `K` models, `*S` shape of a parameter or of some rows of it; `inner` is the Gram matrix [K, K].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainmerge.merging.group import Group, Piece, Rule

TINY = 1e-12


def gram(group: Group, tau: bool) -> Tensor:
    """Inner products of the models, or of their task vectors, [K, K] float64."""
    total = torch.zeros(len(group.names), len(group.names), dtype=torch.float64)
    for piece in group.pieces():
        rows = (piece.taus if tau else piece.weights).double().flatten(1)
        total += rows @ rows.T
    return total


def combined(coefficients: Tensor, based: bool = False) -> Rule:
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


def great_circle(inner: Tensor, t: float, parallel: float) -> Tensor:
    """SLERP's two coefficients; nearly parallel and opposite vectors are interpolated linearly."""
    norms = inner.diagonal().sqrt()
    cosine = (inner[0, 1] * inverse(norms).prod()).clamp(-1, 1)
    if abs(float(cosine)) > parallel:
        return torch.tensor([1 - t, t], dtype=torch.float64)
    angle = torch.acos(cosine)
    steps = torch.tensor([1 - t, t], dtype=torch.float64)
    return torch.sin(steps * angle) / torch.sin(angle)


def tangent(mean: Tensor, inner: Tensor, units: Tensor, weights: Tensor, logarithm: bool) -> Tensor:
    """sum_k w_k (u_k - <u_k, m> m), times angle / sine for the logarithm, as coefficients."""
    cosines = (units * (inner @ mean)).clamp(-1, 1)
    angles = torch.acos(cosines)
    small = angles < TINY
    factors = torch.where(small, 1.0, angles / torch.sin(angles).clamp_min(TINY)) if logarithm else 1.0
    scaled = weights * factors * (units > 0)
    return scaled * units - (scaled * cosines).sum() * mean


def exp(mean: Tensor, along: Tensor, inner: Tensor) -> Tensor:
    """The point of the sphere that is reached from `mean` along a tangent."""
    size = length(along, inner)
    if size < TINY:
        return mean
    step = torch.tensor(size, dtype=torch.float64)
    return torch.cos(step) * mean + torch.sin(step) / step * along


def length(coefficients: Tensor, inner: Tensor) -> float:
    """The norm of a combination of the models."""
    return float((coefficients @ inner @ coefficients).clamp_min(0).sqrt())


def inverse(norms: Tensor) -> Tensor:
    """1 / norm; 0 where it is 0."""
    return torch.where(norms > 0, 1 / norms.clamp_min(1e-300), 0.0)


def nonzero(total: float, group: Group, key: str) -> float:
    """A sum of weights, to divide by.

    Raises:
        ValueError: it is 0.
    """
    if abs(total) < TINY:
        raise ValueError(f"{group.place.name}: the models' `{key}` add up to 0 and cannot be normalised")
    return total
