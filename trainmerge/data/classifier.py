"""A frozen linear classifier over a model's pooled hidden states.

Legend: `B` examples, `T` tokens, `D` hidden size, `V` classes.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Pooling = Literal["mean", "first"]
PoolingOfFile = Literal["mean", "first", "pooled"]


class Classifier(NamedTuple):
    """A head ready for use: logits [B, V] = pooled hidden state @ weight.T + bias."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    pooling: PoolingOfFile
    normalise: bool

    @property
    def width(self) -> int:
        """The number of classes."""
        return len(self.weight)

    def to(self, device: torch.device) -> "Classifier":
        """The same head on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return self._replace(weight=self.weight.to(device), bias=bias)

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Class logits [B, V] from hidden states [B, T, D] and mask [B, T]."""
        pooled = pool(hidden, mask, self.pooling)
        if self.normalise:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return torch.nn.functional.linear(
            pooled, self.weight.to(pooled), None if self.bias is None else self.bias.to(pooled)
        )


def pool(hidden: Tensor, mask: Tensor, pooling: PoolingOfFile) -> Tensor:
    """One vector per example: [B, T, D], [B, T] -> [B, D]; padding, on either side, never counts.

    With `pooled`, `hidden` is the model's own pooled vector, [B, 1, D].
    """
    if pooling == "pooled":
        return hidden[:, 0]
    if pooling == "first":
        first = mask.int().argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first]
    weights = mask[..., None].float()  # float32: the sum over a long text overflows float16
    return ((hidden * weights).sum(dim=1) / weights.sum(dim=1)).to(hidden.dtype)
