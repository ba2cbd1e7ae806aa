"""The experts of a layer as transformers' own module computes them.

Legend: `R` tokens, `k` experts for each token, `H` hidden size, `I` width of an expert.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """A module of experts, called with the choice of a router, whatever its own call is.

    Llama 4's module takes every token for each expert, and the weights multiply its experts' inputs.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self._every = len(signature(experts.forward).parameters) == 1

    def forward(self, states: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        """The sum of the chosen experts' outputs times their weights, [R, H].

        Args:
            states: [R, H].
            numbers: Of the experts, [R, k].
            weights: [R, k].
        """
        if not self._every:
            out: Tensor = self.experts(states, numbers, weights)
            return out
        count: Any = self.experts.num_experts
        scores = torch.zeros(len(states), count, dtype=states.dtype).scatter(1, numbers, weights)
        given = states.repeat(count, 1) * scores.T.reshape(-1, 1)
        every: Tensor = self.experts(given)
        return every.view(count, len(states), -1).sum(0)


def gating_of(experts: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of an expert's gate and up projections [R, I] that its down projection reads."""
    own: Any = experts
    if not hasattr(experts, "_apply_gate"):
        return lambda gate, up: own.act_fn(gate) * up
    if getattr(experts, "is_concatenated", True):
        return lambda gate, up: own._apply_gate(torch.cat([gate, up], dim=-1))
    return lambda gate, up: own._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))


def neuron_values(
    matrices: Mapping[str, Tensor], states: Tensor, gating: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """What an expert's down projection reads for states [R, H]: [R, I], float32."""
    x = states.float()
    gate, up = (
        x @ matrices[kind].float().T + (matrices[bias].float() if (bias := f"{kind}_bias") in matrices else 0)
        for kind in ("gate", "up")
    )
    return gating(gate, up)
