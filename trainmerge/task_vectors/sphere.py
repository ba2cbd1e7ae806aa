"""Points on the sphere through several vectors, as coefficients of the vectors.

Each such point is a combination of the vectors, so their inner products, float64, are enough, and the
geometry is K numbers.

Legend: `K` vectors; `inner` is the Gram matrix [K, K].
"""

import torch
from torch import Tensor

TINY = 1e-12
OPPOSITE = 1e-6  # sine of an angle near pi, where the logarithm has no direction


def great_circle(inner: Tensor, t: float, parallel: float) -> Tensor:
    """SLERP's two coefficients; nearly parallel and opposite vectors are interpolated linearly."""
    norms = inner.diagonal().sqrt()
    cosine = (inner[0, 1] * inverse(norms).prod()).clamp(-1, 1)
    if abs(float(cosine)) > parallel:
        return torch.tensor([1 - t, t], dtype=torch.float64)
    angle = torch.acos(cosine)
    steps = torch.tensor([1 - t, t], dtype=torch.float64)
    return torch.sin(steps * angle) / torch.sin(angle)


def karcher_mean(inner: Tensor, steps: int, tolerance: float) -> Tensor:
    """The coefficients [K] of the vectors' Karcher mean direction, times the mean of their norms.

    Steps of the mean of the logarithms, at most `steps`, until one is shorter than `tolerance` (Karcher,
    1977). Zero vectors have no direction, and count in the mean norm only.
    """
    norms = inner.diagonal().sqrt()
    units = inverse(norms)
    present = (norms > 0).double()
    if not bool(present.any()):
        return torch.zeros_like(norms)
    weights = present / present.sum()
    mean = weights * units
    size = length(mean, inner)
    if size < TINY:  # opposite directions have no mean: start at the first
        mean = torch.zeros_like(mean)
        mean[int(present.argmax())] = units[int(present.argmax())]
    else:
        mean = mean / size
    for _ in range(steps):
        step = tangent(mean, inner, units, weights, logarithm=True)
        if length(step, inner) < tolerance:
            break
        mean = exp(mean, step, inner)
        mean = mean / length(mean, inner)
    return mean * norms.mean()


def tangent(mean: Tensor, inner: Tensor, units: Tensor, weights: Tensor, logarithm: bool) -> Tensor:
    """sum_k w_k (u_k - <u_k, m> m), times angle / sine for the logarithm, as coefficients.

    The logarithm of a vector opposite to the mean has no direction, and is left out.
    """
    cosines = (units * (inner @ mean)).clamp(-1, 1)
    angles = torch.acos(cosines)
    sines = torch.sin(angles)
    flat = torch.where(cosines > 0, 1.0, 0.0)
    factors = torch.where(sines > OPPOSITE, angles / sines.clamp_min(OPPOSITE), flat) if logarithm else 1.0
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
