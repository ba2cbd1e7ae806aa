"""The quadratic of each linear layer's outputs in the coefficients, from second moments of its inputs.

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter, `m x n` a weight (outputs x inputs).
"""

import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainmerge.coefficients.layout import Layout
from trainmerge.coefficients.measured_presets import Measures
from trainmerge.kernels import chunk_bounds
from trainmerge.system.text import listed
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.portions import MOMENTS, portions
from trainmerge.task_vectors.roles import LINEAR
from trainmerge.task_vectors.square_norms import share_of

ROWS = 512  # rows of a weight whose products are in memory at once


class Moments(NamedTuple):
    """Means over one expert's tokens of a layer's inputs: x of a model, y of the expert itself."""

    inputs: Tensor  # x x^T [n, n]
    shift: Tensor | None = None  # (y - x) x^T [n, n]; None where the model is the expert
    shifts: Tensor | None = None  # (y - x) (y - x)^T [n, n]


@dataclass
class System:
    """Minimise c^T A c - 2 b^T c + total; each layer is divided by its total before it is added."""

    products: Tensor  # A [K, K] float64
    effects: Tensor  # b [K] float64
    total: float = 0.0

    @staticmethod
    def zero(experts: int) -> "System":
        """The empty sum."""
        return System(
            torch.zeros(experts, experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)
        )

    def add(self, other: "System") -> None:
        """Add a layer's system, relative to its total."""
        self.products += other.products / other.total
        self.effects += other.effects / other.total
        self.total += 1.0

    def solve(self, ridge: float) -> Tensor:
        """The minimising c, [K]."""
        mean = self.products.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        ridges = ridge * mean * torch.eye(len(self.effects), dtype=torch.float64)
        solution: Tensor = torch.linalg.solve(self.products + ridges, self.effects)
        return solution

    def residual(self, c: Tensor) -> float:
        """The share of the experts' effect that is left at c: 0 is none."""
        return float((c @ self.products @ c - 2 * self.effects @ c) / self.total + 1)


def sum_systems(layout: Layout, measure: Measures, experts: int) -> dict[int, System]:
    """Group -> its system; groups without a linear layer are left out."""
    systems: dict[int, System] = {}
    for name, moments in expert_moments(layout, measure, experts):
        add_layer(systems, name, layout.groups[name], moments, measure)
    return systems


def add_layer(
    systems: dict[int, System],
    name: str,
    groups: Sequence[int],
    moments: Sequence[Moments],
    measure: Measures,
) -> None:
    """Add one layer, relative to its total, to the systems of its groups."""
    for group, system in layer_systems(name, groups, moments, measure):
        if system.total > 0:
            systems.setdefault(group, System.zero(len(moments))).add(system)


def expert_moments(layout: Layout, measure: Measures, experts: int) -> Iterator[tuple[str, list[Moments]]]:
    """Each merged linear layer that every expert's examples reach, with the K moments of its inputs.

    After them, a warning names those that are not measured, if there were any that are.
    """
    seen: list[str] = []
    for names in portions(measure.task_vectors, MOMENTS // experts):
        merged = [name for name in names if name in layout.groups]
        grams = [measure.grams(k, merged, {}) for k in range(experts)]
        for name in merged:
            if all(name in gram for gram in grams):
                seen.append(name)
                yield name, [Moments(gram[name]) for gram in grams]
    if seen:
        _warn_of_unseen(measure.task_vectors, layout, {*seen})


def _warn_of_unseen(task_vectors: TaskVectors, layout: Layout, seen: Set[str]) -> None:
    """Name the merged linear layers without moments, with their share of the task vectors."""
    deltas = task_vectors.deltas
    linear = [name for name in layout.groups if deltas[name].role == "flat" or _is_linear(deltas[name])]
    if unseen := [name for name in linear if name not in seen]:
        warnings.warn(
            f"layer least squares: the inputs of {len(unseen)} linear layers cannot be read "
            f"({listed(unseen)}): experts in one tensor, layers that no example reaches, or weights read "
            "without their layer. They do not count, and LayerLeastSquares gives them the mean of their "
            f"blocks: {share_of(task_vectors, unseen)}",
            stacklevel=3,
        )


def _is_linear(delta: Delta) -> bool:
    return delta.matrices > 0 and delta.role in LINEAR


def layer_systems(
    name: str, groups: Sequence[int], moments: Sequence[Moments], measure: Measures
) -> Iterator[tuple[int, System]]:
    """One weight's system per chunk of outputs; chunks of inputs (Conv1D's rows) share that of the weight."""
    delta, own = measure.task_vectors.deltas[name], measure.originals.deltas[name]
    taus, experts, base = delta.dense(), own.dense(), own.base
    if delta.role == "transposed":
        taus, experts, base = taus.mT, experts.mT, base.mT
        whole = layer_system(taus, experts, base, moments, measure.weights)
        yield from ((group, whole) for group in dict.fromkeys(groups))
        return
    bounds = chunk_bounds(taus.shape[1], len(groups))
    for group, first, last in zip(groups, bounds[:-1], bounds[1:], strict=True):
        rows = slice(first, last)
        own_rows = taus[:, rows], experts[:, rows], base[rows]
        yield group, layer_system(*own_rows, moments, measure.weights)


def layer_system(
    taus: Tensor, experts: Tensor, base: Tensor, moments: Sequence[Moments], weights: Sequence[float]
) -> System:
    """The system of task vectors and the experts' own, [K, m, n], over the base [m, n].

    Expert k's outputs are those of its own inputs y, the merge's those of x: what the merge is to add is
    W_k y - W_0 x = tau_k x + W_k (y - x).
    """
    system = System.zero(len(taus))
    for k, (moment, weight) in enumerate(zip(moments, weights, strict=True)):
        second = weight * moment.inputs.double()
        for first in range(0, taus.shape[1], ROWS):
            part = slice(first, first + ROWS)
            rows, own = taus[:, part].double(), experts[k, part].double()
            told = own @ second  # (W_k y - W_0 x) x^T
            system.total += float((told * own).sum())
            if moment.shift is not None and moment.shifts is not None:
                whole = base[part].double() + own
                moved = whole @ (weight * moment.shift.double())
                system.total += float(2 * (moved * own).sum())
                system.total += weight * float(((whole @ moment.shifts.double()) * whole).sum())
                told = told + moved
            system.products += (rows @ second).flatten(1) @ rows.flatten(1).T
            system.effects += rows.flatten(1) @ told.flatten()
    return system
