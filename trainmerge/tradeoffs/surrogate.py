"""Quadratic surrogates of losses, fitted to values and gradients (after MAP, ICLR 2025, arXiv 2406.07529).

MAP fits 1 + n + n (n + 1) / 2 numbers per task to as many evaluated merges. Here every evaluation also gives
the n partial derivatives, so n + 1 merges in general position are enough: differences of gradients give the
curvature. With more points, it is a least-squares fit.

Legend: `P` points, `T` tasks, `n` coordinates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quadratics:
    """T losses: constant + linear . u + u . curvature . u / 2."""

    constant: Tensor  # [T]
    linear: Tensor  # [T, n]
    curvature: Tensor  # [T, n, n], symmetric

    def __call__(self, u: Tensor) -> Tensor:
        """Losses [..., T] at points [..., n]; differentiable."""
        bent = torch.einsum("...i,tij,...j->...t", u, self.curvature, u)
        return self.constant + u @ self.linear.T + bent / 2


def check_points(P: int, n: int) -> None:
    """Raise ValueError if P points do not determine a quadratic in n coordinates."""
    if n + 1 > P:
        raise ValueError(f"{P} points are too few for a quadratic in {n} coordinates: it needs {n + 1}")


def fit_quadratics(points: Tensor, losses: Tensor, slopes: Tensor) -> Quadratics:
    """The least-squares quadratics of losses [P, T] and gradients [P, T, n] at points [P, n].

    Values and gradients have equal weight, so coordinates should be scaled to about 1.

    Raises:
        ValueError: fewer than n + 1 points, or numbers that are not finite.
    """
    P, n = points.shape
    pairs = torch.triu_indices(n, n)
    check_points(P, n)
    rows = torch.cat([_values(points, pairs)[:, None], _slopes(points, pairs)], dim=1)  # [P, 1 + n, unknowns]
    measured = torch.cat([losses[:, None], slopes.transpose(1, 2)], dim=1)  # [P, 1 + n, T]
    if not measured.isfinite().all():
        raise ValueError(
            "a measured merge has a loss or a gradient that is not finite: choose a smaller --radius"
        )
    solved = torch.linalg.lstsq(rows.flatten(0, 1), measured.flatten(0, 1), driver="gelsd").solution.T
    upper = torch.zeros(len(solved), n, n, dtype=solved.dtype)
    upper[:, pairs[0], pairs[1]] = solved[:, 1 + n :]
    return Quadratics(solved[:, 0], solved[:, 1 : 1 + n], upper + upper.transpose(1, 2))


def _values(u: Tensor, pairs: Tensor) -> Tensor:
    """Each unknown's contribution to a loss, [P, unknowns]. On the diagonal it is half the curvature."""
    return torch.cat([torch.ones_like(u[:, :1]), u, u[:, pairs[0]] * u[:, pairs[1]]], dim=1)


def _slopes(u: Tensor, pairs: Tensor) -> Tensor:
    """Each unknown's contribution to a gradient, [P, n, unknowns]."""
    axes = torch.eye(u.shape[1], dtype=u.dtype)
    bent = axes[:, pairs[0]] * u[:, None, pairs[1]] + axes[:, pairs[1]] * u[:, None, pairs[0]]
    flat = axes.expand(len(u), -1, -1)
    return torch.cat([torch.zeros_like(flat[..., :1]), flat, bent], dim=2)
