"""A mixture with fewer experts: its tensors, from the files of the larger one.

A group's expert is sum_e w_e P_e W_e over its members, with w their share of the group's saliency, and P_e
the order of e's neurons that is nearest to the centroid's. A group of one is that expert, bit for bit.

Legend: `M` experts of a layer, `H` hidden size, `I` width of an expert, `S` tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from trainmerge.checkpoints import Checkpoint
from trainmerge.export.form import Form, divided
from trainmerge.export.tensors import OnlyModel
from trainmerge.mixtures.absorbing import Absorbing
from trainmerge.mixtures.groups import Groups
from trainmerge.mixtures.layers import MixtureLayer
from trainmerge.mixtures.members import Members
from trainmerge.mixtures.saliency import Saliency
from trainmerge.mixtures.submoe import projected
from trainmerge.system.safetensors_file import TensorInfo, read_ahead
from trainmerge.task_vectors.places import parameter_of, view


@dataclass(frozen=True)
class LayerCoefficients:
    """What is learned of one layer: 0 leaves the groups' first experts as they are.

    Args:
        experts: Of the members after the first, in the order of the layer's kinds, [kinds, M, J].
        rows: Router's tensor -> what is added to it, [M, ...].
    """

    experts: Tensor
    rows: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Shrunk(OnlyModel):
    """The tensors after.

    Args:
        base: The larger mixture.
        layers: Its layers.
        groups: Prefix -> its groups.
        measured: Prefix -> sums over calibration tokens; not needed where every group is one expert.
        learned: Prefix -> coefficients, instead of the saliencies'.
        weights: What members weigh: `saliency` or `usage`.
        rank: Project each merged matrix onto so many directions of its group's (`submoe.projected`).
        absorbing: Whether kept experts absorb the neurons of the dropped ones (`dern`).
    """

    base: Checkpoint
    layers: Sequence[MixtureLayer]
    groups: Mapping[str, Groups]
    measured: Mapping[str, Saliency] = field(default_factory=dict)
    learned: Mapping[str, LayerCoefficients] = field(default_factory=dict)
    weights: str = "saliency"
    rank: int | None = None
    absorbing: bool = False
    form: Form = field(default_factory=Form)

    @cached_property
    def members(self) -> Members:
        """The experts before."""
        return Members(self.base, self.measured)

    @cached_property
    def routers(self) -> Mapping[str, MixtureLayer]:
        """Tensors with one row per expert -> their layer."""
        return {name: layer for layer in self.layers for name in layer.routers}

    @cached_property
    def stacks(self) -> Mapping[str, MixtureLayer]:
        """Tensors of all experts -> their layer."""
        return {name: layer for layer in self.layers for name in layer.stacks}

    @cached_property
    def experts(self) -> Mapping[str, tuple[MixtureLayer, str, int]]:
        """Name after -> layer, kind of matrix, and group."""
        return {
            layer.expert(place, kind): (layer, kind, place)
            for layer in self.layers
            for place in range(len(self.groups[layer.prefix]))
            for kind in layer.kinds
        }

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The headers."""
        found: dict[str, TensorInfo] = {}
        by_row = {**self.routers, **self.stacks}
        every = {
            layer.expert(e, k) for layer in self.layers for e in range(layer.experts) for k in layer.kinds
        }
        for name, info in self.base.tensors.items():
            if name in by_row:
                rows = len(self.groups[by_row[name].prefix])
                found[name] = info._replace(shape=torch.Size((rows, *info.shape[1:])))
            elif name not in every or name in self.experts:
                found[name] = info
        return found

    @cached_property
    def shards(self) -> Mapping[str, tuple[str, ...]]:
        """File name -> its tensors."""
        return divided({name: info.nbytes for name, info in self.tensors.items()})

    def merged(self, name: str) -> bool:
        """Whether a tensor is computed from several experts."""
        if name in self.stacks:
            groups = self.groups[self.stacks[name].prefix]
            return self.absorbing or any(len(group) > 1 for group in groups)
        if name not in self.experts:
            return False
        layer, _, place = self.experts[name]
        return self.absorbing or len(self.groups[layer.prefix][place]) > 1

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor after."""
        if name in self.routers:
            layer = self.routers[name]
            yield self.rows(layer, name, self._coefficients(layer)).to(self.base.tensors[name].dtype)
        elif name in self.stacks:
            yield from self._stack(self.stacks[name], name)
        elif name in self.experts:
            yield self._expert(*self.experts[name])
        else:
            yield self.base.read(name)

    def read_ahead_of(self, name: str) -> None:
        """Ask the kernel to read ahead the pages that `pieces` will need."""
        if name in self.experts:
            layer, kind, place = self.experts[name]
            name = layer.expert(self.groups[layer.prefix][place][0], kind)
        read_ahead(self.base.read(name))

    def _stack(self, layer: MixtureLayer, name: str) -> Iterator[Tensor]:
        """A stack after, one expert at a time [1, ...]."""
        kinds = [kind for kind, place in layer.kinds.items() if parameter_of(place) == name]
        for place, group in enumerate(self.groups[layer.prefix]):
            piece = self.base.read(name)[group[0]][None]
            if self.absorbing or len(group) > 1:
                piece = piece.clone()
                for kind in kinds:
                    view(layer.expert(0, kind), piece).copy_(self._expert(layer, kind, place))
            yield piece

    def _coefficients(self, layer: MixtureLayer) -> LayerCoefficients:
        return self.learned.get(layer.prefix) or self.saliency_coefficients(layer)

    def rows(self, layer: MixtureLayer, name: str, coefficients: LayerCoefficients) -> Tensor:
        """A router's tensor after, [M, ...]: the rows of the groups' first experts, and what is learned."""
        first = self.base.read(name)[[group[0] for group in self.groups[layer.prefix]]]
        return first.float() + coefficients.rows[name] if name in coefficients.rows else first

    def _expert(self, layer: MixtureLayer, kind: str, place: int) -> Tensor:
        if self.absorbing:
            return self._layers[layer.prefix].expert(kind, place)
        group = self.groups[layer.prefix][place]
        first = layer.read(self.base, group[0], kind)
        if len(group) == 1:
            return first
        own = self._coefficients(layer).experts[list(layer.kinds).index(kind), place]
        total = first.float()
        for number, member in enumerate(group[1:]):
            apart = self.members.aligned(layer, kind, group[0], member).float() - first.float()
            total = total + float(own[number]) * apart
        if self.rank is not None and total.dim() > 1:
            total = projected(
                total, [self.members.aligned(layer, kind, group[0], e) for e in group], self.rank
            )
        return total.to(first.dtype)

    @cached_property
    def _layers(self) -> dict[str, Absorbing]:
        return {
            own.prefix: Absorbing(self.base, own, self.groups[own.prefix], self.measured[own.prefix])
            for own in self.layers
        }

    def saliency_coefficients(self, layer: MixtureLayer) -> LayerCoefficients:
        """The members' shares of the group's saliency or usage, and the first members' rows of the router."""
        groups = self.groups[layer.prefix]
        width = max(len(group) for group in groups) - 1
        shares = torch.zeros(len(groups), width)
        if width:
            scores = self.measured[layer.prefix].importance(self.weights)
            for place, group in enumerate(groups):
                own = scores[list(group)]
                shares[place, : len(group) - 1] = (own / own.sum())[1:]
        return LayerCoefficients(shares.expand(len(layer.kinds), -1, -1))
