"""The members of groups, with their neurons in the order of their group's first.

Legend: `H` hidden size, `I` width of an expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from trainmerge.checkpoints import Checkpoint
from trainmerge.mixtures.layers import MixtureLayer
from trainmerge.mixtures.neurons import matching_order, neurons
from trainmerge.mixtures.saliency import Saliency


@dataclass(frozen=True)
class Members:
    """The experts of a mixture, of which some are brought into the order of others."""

    base: Checkpoint
    measured: Mapping[str, Saliency]

    def aligned(self, layer: MixtureLayer, kind: str, centroid: int, member: int) -> Tensor:
        """A member's matrix with its neurons in the centroid's order: gate and up [I, H], down [H, I]."""
        weight = layer.read(self.base, member, kind)
        if member == centroid or kind == "down_bias":
            return weight
        order = self._order(layer, centroid, member)
        return weight[:, order] if kind == "down" else weight[order]

    @cached_property
    def _orders(self) -> dict[tuple[str, int, int], Tensor]:
        return {}

    def _order(self, layer: MixtureLayer, centroid: int, member: int) -> Tensor:
        key = layer.prefix, centroid, member
        if key not in self._orders:
            own = self.measured[layer.prefix]
            one, other = (
                neurons({kind: layer.read(self.base, number, kind) for kind in layer.kinds}, own)
                for number in (centroid, member)
            )
            self._orders[key] = matching_order(one, other)
        return self._orders[key]
