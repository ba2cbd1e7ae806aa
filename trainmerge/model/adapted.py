"""A new low-rank adapter over the linear layers of a model, by hooks: no weight is changed.

Legend: `r` rank, `in`, `out` sizes of a layer.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trainmerge.model.hooks import hooked
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.named_layers import linear_layers
from trainmerge.task_vectors.draws import seeded


@dataclass(frozen=True)
class LowRankChange:
    """x -> up (down x), added to a layer's output; nothing at first, as in LoRA (arXiv 2106.09685)."""

    down: Tensor  # [r, in] float32
    up: Tensor  # [out, r] float32

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """As a forward hook: the layer's output with the change of its input."""
        change = nn.functional.linear(nn.functional.linear(inputs[0].to(self.down.dtype), self.down), self.up)
        return output + change.to(output.dtype)


def new_changes(merged: MergedModel, rank: int, seed: int) -> dict[str, LowRankChange]:
    """Name -> the change of each linear layer whose weight is merged; draws depend on seed and name only."""
    layers = linear_layers(merged, merged.coefficients.layout.groups)
    return {
        name: _new(merged.task_vectors.deltas[name].shape, name, rank, seed, layers[name]) for name in layers
    }


def _new(shape: tuple[int, ...], name: str, rank: int, seed: int, layer: nn.Module) -> LowRankChange:
    out, width = shape if isinstance(layer, nn.Linear) else reversed(shape)  # Conv1D has [in, out]
    device = next(layer.parameters()).device
    down = torch.randn(rank, width, generator=seeded(seed, name)) / width**0.5
    return LowRankChange(
        down.to(device).requires_grad_(), torch.zeros(out, rank, device=device).requires_grad_()
    )


@contextmanager
def adapted(merged: MergedModel, changes: Mapping[str, LowRankChange]) -> Iterator[None]:
    """In this context the model is its base with these changes of layers, the only values with a gradient."""
    layers = linear_layers(merged, changes)
    learned = [parameter for parameter in merged.module.parameters() if parameter.requires_grad]
    experts = len(merged.task_vectors.experts)
    with ExitStack() as stack:
        stack.callback(partial(_require, learned, True))
        _require(learned, False)
        stack.enter_context(merged.uniform(torch.zeros(experts)))
        stack.enter_context(hooked(layers[name].register_forward_hook(own) for name, own in changes.items()))
        yield


def _require(parameters: list[nn.Parameter], gradient: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(gradient)
