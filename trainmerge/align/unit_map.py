"""The units of an axis in another order, and each of them under a matrix.

Legend: `n` units of an axis, `w` the width of one (1 of a neuron, d of a head).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainmerge.align.families import Touch


@dataclass(frozen=True)
class UnitMap:
    """Unit i of the result is the old unit order[i], times matrices[i] if there are matrices."""

    order: Tensor  # [n] int64
    matrices: Tensor | None = None  # [n, w, w] float64

    @property
    def moved(self) -> int:
        """The number of units with another place."""
        return int((self.order != torch.arange(len(self.order))).sum())

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return self.matrices is None and not self.moved

    def then(self, later: "UnitMap") -> "UnitMap":
        """The map that applies `later` after this one."""
        own = None if self.matrices is None else self.matrices[later.order]
        both = own if later.matrices is None else later.matrices if own is None else later.matrices @ own
        return UnitMap(self.order[later.order], both)

    def __call__(self, tensor: Tensor, touch: Touch) -> Tensor:
        """The tensor with the touched axis mapped; in float64 if there are matrices."""
        parts = list(tensor.movedim(touch.axis, 0).chunk(touch.parts))
        units = parts[touch.part].reshape(len(self.order), -1)[self.order]
        if self.matrices is not None:
            width = self.matrices.shape[-1]
            units = self.matrices @ units.double().reshape(len(units), width, -1)
            parts = [part.double() for part in parts]
        parts[touch.part] = units.reshape(parts[touch.part].shape)
        return torch.cat(parts).movedim(0, touch.axis)
