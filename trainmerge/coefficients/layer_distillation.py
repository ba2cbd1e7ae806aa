"""Coefficients learned block by block on each block's outputs: the learned sibling of layer least squares.

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter, `g` groups of one block.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.coefficients.layout import Layout
from trainmerge.coefficients.measured_presets import BlockError, MeasuredPreset, Measures
from trainmerge.system.minimise import minimise
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.parameter_names import block_of


@dataclass(frozen=True)
class LayerDistillation(MeasuredPreset):
    """The coefficients c with the least error of each block's outputs, learned block after block.

    For a block f with weights W(c) = W_0 + sum_j c_j tau_j, first to last, it minimises

        sum_k w_k |f(W(c), X_k) - Y_k|^2 / sum_k w_k |f(W_0, X_k) - Y_k|^2

    X_k are the block's inputs on expert k's examples in the model merged so far, Y_k the expert's own
    outputs of the block. The form is ProDistill's (arXiv 2502.12706), which learns one coefficient per entry;
    here it is one per coefficient group, by L-BFGS on all examples. A linear block gives the coefficients of
    `LayerLeastSquares(sequential=True)` without its ridge. The loss of a block never ends above its start.
    Weights that no examples reach, matrices of stacked experts, and a language model's output layer, whose
    outputs are as wide as its vocabulary, stay at the start.

    Args:
        steps: Most steps of L-BFGS per block; each takes a forward and backward of the block or two.
        start: Every coefficient before its block is learned; by default 1 / K.
        tolerance: The largest entry of the relative loss's gradient at which a block is done.
    """

    steps: int = 20
    start: float | None = None
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self, steps="[1, inf)", start="[0, inf)", tolerance="[0, inf)")

    @override
    def measured(self, experts: Sequence[str], layout: Layout, measure: Measures) -> Tensor:
        K = len(experts)
        start = 1 / K if self.start is None else self.start
        values = torch.full((K, len(layout.labels)), start, dtype=torch.float64)
        left: list[float] = []
        seen: dict[int, str] = {}
        for block, found in groupby(measure.in_order(layout.groups), block_of):
            names = list(found)
            for group in (group for name in names for group in layout.groups[name]):
                if seen.setdefault(group, block) != block:
                    raise ValueError("LayerDistillation needs one coefficient per block, or a finer grouping")
            error = measure.block(names, values)
            if error is not None:
                left += self._learn(names, layout, measure.task_vectors.deltas, error, values)
        if not left:
            raise ValueError("LayerDistillation: the examples reach no block whose weights are merged")
        print(f"layer distillation: {sum(left) / len(left):.0%} of the experts' effect on blocks is left")
        return values.float()

    def _learn(
        self,
        names: Sequence[str],
        layout: Layout,
        deltas: Mapping[str, Delta],
        error: BlockError,
        values: Tensor,
    ) -> list[float]:
        """Write the learned coefficients of a block into `values`; returns the relative loss that is left."""
        groups = dict.fromkeys(group for name in names for group in layout.groups[name])
        places = {group: i for i, group in enumerate(groups)}
        own = {name: [places[group] for group in layout.groups[name]] for name in names}
        whole = error({name: deltas[name].base for name in names})[0]
        if math.isnan(whole):
            raise ValueError(
                f"LayerDistillation: the error of the block of {names[0]} is not a number: base or experts "
                "give outputs that are not finite on the examples, as float16 ones that overflow do"
            )
        if not whole:
            return []
        before = values[:, list(places)]  # a copy
        best: tuple[float, Tensor] = (torch.inf, before)

        def loss(c: Tensor) -> Tensor:
            """Relative, of c [K, g]; its gradient is that of the block's weights, times the task vectors."""
            nonlocal best
            now = c.detach()
            merged = {name: _merged(deltas[name], now[:, at]) for name, at in own.items()}
            value, gradients = error(merged)
            slope = torch.zeros_like(now)
            for name, gradient in gradients.items():
                inner = deltas[name].inner(gradient, len(own[name])).to(slope)
                slope.index_add_(1, torch.tensor(own[name]), inner)
            if value < best[0]:
                best = (value, now.clone())
            return value / whole + ((c - now) * (slope / whole)).sum()

        minimise(loss, before, self.steps, self.tolerance)
        values[:, list(places)] = best[1]
        return [best[0] / whole]


def _merged(delta: Delta, coefficients: Tensor) -> Tensor:
    """Base + sum_k c_k tau_k of one parameter; coefficients [K, C]."""
    out = torch.empty_like(delta.base)
    delta.merge(out, coefficients)
    return out
