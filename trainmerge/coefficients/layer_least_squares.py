"""Coefficients by least squares on the outputs of linear layers: one pass of each expert, and no backward.

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter, `m x n` a weight (outputs x inputs).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.coefficients.layout import Layout
from trainmerge.coefficients.measured_presets import MeasuredPreset, Measures
from trainmerge.kernels import chunk_bounds
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.parameter_names import block_of
from trainmerge.task_vectors.portions import MOMENTS, portions

ROWS = 512  # rows of a weight whose products are in memory at once


@dataclass(frozen=True)
class LayerLeastSquares(MeasuredPreset):
    """The coefficients c with the least error of each linear layer's outputs on the experts' own inputs.

    For a weight with task vectors tau_j and expert k's layer inputs X_k it minimises

        sum_k w_k |(sum_j c_j tau_j - tau_k) X_k|^2 / sum_k w_k |tau_k X_k|^2

    which is a K x K system of second moments; a group of several weights sums theirs, so every layer counts
    alike. Norms, biases and embeddings take the mean coefficient of their block. The idea is known from
    one-shot merging by layers' outputs (arXiv 2502.12706, 2605.29101); a single expert gets 1.

    Args:
        ridge: Added to the system's diagonal, times its mean: what it cannot tell apart is shared alike.
    """

    ridge: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self, ridge="(0, inf)")

    @override
    def measured(self, experts: Sequence[str], layout: Layout, measure: Measures) -> Tensor:
        systems = sum_systems(layout, measure, len(experts))
        if not systems:
            raise ValueError("LayerLeastSquares: the examples reach no linear layer whose weight is merged")
        solved = {group: system.solve(self.ridge) for group, system in systems.items()}
        left = sum(systems[group].residual(c) for group, c in solved.items()) / len(solved)
        print(f"layer least squares: {left:.0%} of the experts' effect on layers' outputs is out of reach")
        return spread(layout, solved, len(experts)).float()


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
    for names in portions(measure.task_vectors, MOMENTS // experts):
        merged = [name for name in names if name in layout.groups]
        grams = [measure.grams(k, merged, {}) for k in range(experts)]
        for name in merged:
            moments = [gram[name] for gram in grams if name in gram]
            if len(moments) < experts:
                continue
            for group, system in layer_systems(name, layout.groups[name], moments, measure):
                if system.total > 0:
                    systems.setdefault(group, System.zero(experts)).add(system)
    return systems


def layer_systems(
    name: str, groups: Sequence[int], moments: Sequence[Tensor], measure: Measures
) -> Iterator[tuple[int, System]]:
    """One weight's system per chunk of outputs; chunks of inputs (Conv1D's rows) share that of the weight."""
    delta, own = measure.task_vectors.deltas[name], measure.originals.deltas[name]
    taus, experts = delta.dense(), own.dense()
    if delta.role == "transposed":
        taus, experts = taus.mT, experts.mT
        whole = layer_system(taus, experts, moments, measure.weights)
        yield from ((group, whole) for group in dict.fromkeys(groups))
        return
    bounds = chunk_bounds(taus.shape[1], len(groups))
    for group, first, last in zip(groups, bounds[:-1], bounds[1:], strict=True):
        yield group, layer_system(taus[:, first:last], experts[:, first:last], moments, measure.weights)


def layer_system(
    taus: Tensor, experts: Tensor, moments: Sequence[Tensor], weights: Sequence[float]
) -> System:
    """The system of task vectors [K, m, n], the experts' own [K, m, n] and K second moments [n, n]."""
    system = System.zero(len(taus))
    for k, (moment, weight) in enumerate(zip(moments, weights, strict=True)):
        second = weight * moment.double()
        for first in range(0, taus.shape[1], ROWS):
            rows = taus[:, first : first + ROWS].double()
            own = experts[k, first : first + ROWS].double()
            moved = (rows @ second).flatten(1)  # [K, rows * n]
            system.products += moved @ rows.flatten(1).T
            system.effects += moved @ own.flatten()
            system.total += float(((own @ second) * own).sum())
    return system


def spread(layout: Layout, solved: Mapping[int, Tensor], experts: int) -> Tensor:
    """[K, G]: groups without a system take the mean of their parameters' blocks, or of all."""
    blocks: dict[str, list[int]] = {}
    for name, groups in layout.groups.items():
        blocks.setdefault(block_of(name), []).extend(group for group in groups if group in solved)
    everywhere = torch.stack(list(solved.values())).mean(dim=0)
    values = everywhere[:, None].repeat(1, len(layout.labels))
    for name, groups in layout.groups.items():
        near = blocks[block_of(name)]
        mean = torch.stack([solved[group] for group in near]).mean(dim=0) if near else everywhere
        for group in groups:
            values[:, group] = solved.get(group, mean)
    assert values.shape == (experts, len(layout.labels))
    return values
