"""Coefficients by least squares on the outputs of linear layers: one pass of each expert, and no backward.

Legend: `K` experts, `G` coefficient groups, `m x n` a weight (outputs x inputs).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.coefficients.layer_systems import Moments, System, add_layer, sum_systems
from trainmerge.coefficients.layout import Layout
from trainmerge.coefficients.measured_presets import MeasuredPreset, Measures
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.parameter_names import block_of


@dataclass(frozen=True)
class LayerLeastSquares(MeasuredPreset):
    """The coefficients c with the least error of each linear layer's outputs on the experts' own inputs.

    For a weight with task vectors tau_j and expert k's layer inputs X_k it minimises

        sum_k w_k |(sum_j c_j tau_j - tau_k) X_k|^2 / sum_k w_k |tau_k X_k|^2

    which is a K x K system of second moments; a group of several weights sums theirs, so every layer counts
    alike. Norms, biases and embeddings take the mean coefficient of their block, and so do linear layers
    whose inputs cannot be read, which a warning names (experts in one tensor). The idea is known from
    one-shot merging by layers' outputs (arXiv 2502.12706, 2605.29101); a single expert gets 1.

    `sequential` then solves the blocks again, first to last, with the inputs X_k of the model merged so far
    and the outputs of the expert on its own as targets, so later blocks correct what earlier ones changed.

    Args:
        ridge: Added to the system's diagonal, times its mean: what it cannot tell apart is shared alike.
        sequential: Solve block after block; two passes per expert and block, and the inputs of one block's
            layers on all examples of one expert in memory.
    """

    ridge: float = 1e-6
    sequential: bool = False

    def __post_init__(self) -> None:
        check_fields(self, ridge="(0, inf)")

    @override
    def measured(self, experts: Sequence[str], layout: Layout, measure: Measures) -> Tensor:
        systems = sum_systems(layout, measure, len(experts))
        if not systems:
            raise ValueError("LayerLeastSquares: the examples reach no linear layer whose weight is merged")
        solved = {group: system.solve(self.ridge) for group, system in systems.items()}
        if self.sequential:
            systems, solved = self._in_sequence(layout, measure, solved)
        left = sum(systems[group].residual(c) for group, c in solved.items()) / len(solved)
        print(f"layer least squares: {left:.0%} of the experts' effect on layers' outputs is out of reach")
        return fill_groups(layout, solved, len(experts)).float()

    def _in_sequence(
        self, layout: Layout, measure: Measures, first: Mapping[int, Tensor]
    ) -> tuple[dict[int, System], dict[int, Tensor]]:
        """Systems and solutions block by block; blocks not yet reached have the `first` solutions."""
        experts, systems = len(measure.weights), dict[int, System]()
        solved = dict(first)
        for _, names in groupby(measure.in_order(layout.groups), block_of):
            values = fill_groups(layout, solved, experts).float()
            block = list(names)
            moments = [measure.shifted(k, block, values) for k in range(experts)]
            reached = [name for name in block if all(name in own for own in moments)]
            for name in reached:
                own = [Moments(*of_expert[name]) for of_expert in moments]
                add_layer(systems, name, layout.groups[name], own, measure)
            groups = {group for name in reached for group in layout.groups[name]} & systems.keys()
            solved |= {group: systems[group].solve(self.ridge) for group in sorted(groups)}
        return systems, {group: solved[group] for group in systems}


def fill_groups(layout: Layout, solved: Mapping[int, Tensor], experts: int) -> Tensor:
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
