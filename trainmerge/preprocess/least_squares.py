"""DOGE's constrained least squares: a change D that fits every row's K equations, outside a subspace.

    min_D sum_k sum_row (gap_k - <tau_k, D>)^2,   U^T D = 0

Legend: `K` experts, `m x n` a matrix, `gaps` [K, m] the targets of every row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainmerge.preprocess.spectrum import EPSILON
from trainmerge.task_vectors.delta import project_out

STEPS = 200  # usually a few suffice; many if rows differ much in norm


def closest(taus: Tensor, gaps: Tensor, basis: Tensor) -> Tensor:
    """The least-squares solution D [m, n] of least norm, orthogonal to the columns of `basis` [m, k].

    First with each row's K equations made orthonormal, which takes about 7 steps in float32 instead of 200;
    then with the original equations, which changes nothing if all of them can be satisfied.
    """
    solution = torch.zeros_like(taus[0])
    for scale in (_whitening(taus), None):
        solution = _conjugate_gradients(Equations(taus, basis, scale), gaps, solution)
    return project_out(solution, basis)


@dataclass(frozen=True)
class Equations:
    """The map from D to every row: scale <tau_k, D projected off the basis>, `scale` [m, K, K] or none."""

    taus: Tensor  # [K, m, n]
    basis: Tensor  # [m, k]
    scale: Tensor | None

    def scaled(self, numbers: Tensor) -> Tensor:
        """[K, m] -> [K, m]."""
        return numbers if self.scale is None else torch.einsum("mjk,km->jm", self.scale, numbers)

    def of(self, change: Tensor) -> Tensor:
        """[m, n], already projected off the basis -> [K, m]."""
        return self.scaled(torch.stack([torch.einsum("mn,mn->m", tau, change) for tau in self.taus]))

    def transposed(self, numbers: Tensor) -> Tensor:
        """[K, m] -> [m, n], projected off the basis."""
        total = torch.zeros_like(self.taus[0])
        for tau, column in zip(self.taus, self.scaled(numbers), strict=True):
            total.addcmul_(tau, column[:, None])
        return project_out(total, self.basis)


def _whitening(taus: Tensor) -> Tensor:
    """(tau tau^T)^-1/2 of every row's K vectors, [m, K, K]; 0 where they are zero."""
    products = torch.stack([torch.einsum("mn,kmn->mk", tau, taus) for tau in taus], dim=1)
    values, vectors = torch.linalg.eigh(products.double())
    solid = values > EPSILON * values[:, -1:]
    roots = torch.where(solid, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    whitening: Tensor = vectors * roots[:, None, :] @ vectors.mT
    return whitening.to(taus)


def _conjugate_gradients(equations: Equations, gaps: Tensor, start: Tensor) -> Tensor:
    """CGLS from `start`, until a step no longer changes the residual."""
    epsilon = torch.finfo(start.dtype).eps
    wanted = equations.scaled(gaps)
    tolerance = 8 * epsilon * equations.transposed(wanted).norm()
    solution, residual = start.clone(), wanted - equations.of(start)
    slope = direction = equations.transposed(residual)
    size = slope.norm()
    for _ in range(STEPS):
        if size <= tolerance:
            break
        image = equations.of(direction)
        length = (size / image.norm()).square()
        gain = size.square() * length / residual.square().sum()
        solution.add_(direction * length)
        residual -= length * image
        if gain <= epsilon:
            break
        before, slope = size, equations.transposed(residual)
        size = slope.norm()
        direction = slope + (size / before).square() * direction
    return solution
