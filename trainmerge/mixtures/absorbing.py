"""A layer whose kept experts absorb the neurons of the dropped ones (`dern`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trainmerge.checkpoints import Checkpoint
from trainmerge.mixtures.dern import absorbed, nearest_neurons
from trainmerge.mixtures.groups import Groups
from trainmerge.mixtures.layers import MixtureLayer
from trainmerge.mixtures.neurons import neurons
from trainmerge.mixtures.saliency import Saliency


@dataclass(frozen=True)
class Absorbing:
    """One layer; all of its experts' matrices of one kind are in memory at a time.

    Args:
        base: The larger mixture.
        layer: Its layer.
        groups: The kept experts, one in each group.
        own: The layer's sums.
    """

    base: Checkpoint
    layer: MixtureLayer
    groups: Groups
    own: Saliency

    def expert(self, kind: str, place: int) -> Tensor:
        """The matrix of the kept expert at a place."""
        if kind == "down_bias":
            return self.layer.read(self.base, self._kept[place], kind)
        if kind not in self._made:
            self._made.clear()
            self._made[kind] = self._absorbed(kind)
        made = self._made[kind][place]
        return made.T.contiguous() if kind == "down" else made

    @cached_property
    def _kept(self) -> list[int]:
        return [group[0] for group in self.groups]

    @cached_property
    def _dropped(self) -> list[int]:
        return [number for number in range(self.layer.experts) if number not in self._kept]

    @cached_property
    def _made(self) -> dict[str, list[Tensor]]:
        return {}

    @cached_property
    def _homes(self) -> list[Tensor]:
        kept, dropped = (
            [self._features(number) for number in numbers] for numbers in (self._kept, self._dropped)
        )
        return nearest_neurons(kept, dropped)

    def _features(self, number: int) -> Tensor:
        matrices: Mapping[str, Tensor] = {
            kind: self.layer.read(self.base, number, kind) for kind in self.layer.kinds
        }
        return torch.cat(neurons(matrices, self.own), dim=1)

    def _absorbed(self, kind: str) -> list[Tensor]:
        kept, dropped = (
            [self._rows(kind, number) for number in numbers] for numbers in (self._kept, self._dropped)
        )
        scores = self.own.importance("saliency")
        weights = [float(scores[number]) for number in [*self._kept, *self._dropped]]
        return absorbed(kept, dropped, self._homes, weights)

    def _rows(self, kind: str, number: int) -> Tensor:
        """A matrix with neurons first."""
        matrix = self.layer.read(self.base, number, kind)
        return matrix.T if kind == "down" else matrix
