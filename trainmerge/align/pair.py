"""A base and one expert of its shapes, read tensor by tensor, with what is known of how they line up.

Legend: `n` units of a space, `F` numbers per unit, `H` query heads, `G` key heads.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trainmerge.align.families import STREAM, Family, Gauges, Touch, family_of, touches_of
from trainmerge.align.unit_map import UnitMap
from trainmerge.task_vectors.parameter_names import attention_heads

Read = Callable[[str], Tensor]
NUMBERS = 1 << 24  # that are float32 at a time


@dataclass(frozen=True)
class Anatomy:
    """The spaces of a model's units.

    Raises as `anatomy`.
    """

    family: Family
    touches: Mapping[str, tuple[Touch, ...]]
    heads: int
    shared: int
    gauges: Gauges  # of query and key

    @property
    def layers(self) -> list[str]:
        """The layers, in the files' order."""
        return list(dict.fromkeys(layer for name in self.touches if (layer := self.family.place(name)[0])))

    def touching(self, space: str) -> Iterator[tuple[str, Touch]]:
        """The tensors with an axis over a space's units, and the axis."""
        for name, touches in self.touches.items():
            yield from ((name, touch) for touch in touches if touch.space == space)


def anatomy(config: Mapping[str, Any], names: Sequence[str]) -> Anatomy:
    """The spaces of a model with this config.json and these parameters.

    Raises:
        ValueError: its family, or one of its tensors, is not known.
    """
    family = family_of(config)
    touches, unknown = touches_of(family, names)
    if unknown:
        raise ValueError(
            f"recipe.align does not know how {', '.join(unknown[:3])} depends on the order of units in a "
            f"{config['model_type']}. Leave align out, or name the tensor in recipe.ignore"
        )
    gauges: Gauges = family.gauges
    parameters = config.get("rope_parameters") or config
    if any("q_norm" in name for name in names) or parameters.get("partial_rotary_factor", 1) != 1:
        gauges = "none"
    heads, shared = attention_heads(config)
    return Anatomy(family, touches, heads, shared, gauges)


@dataclass(frozen=True)
class Pair:
    """Two readers of one anatomy, and the expert's maps so far, by space."""

    anatomy: Anatomy
    base: Read
    expert: Read
    maps: Mapping[str, UnitMap] = field(default_factory=dict)

    def with_maps(self, found: Mapping[str, UnitMap]) -> "Pair":
        """The same with further maps, after those so far."""
        after = {
            space: self.maps[space].then(own) if space in self.maps else own for space, own in found.items()
        }
        return replace(self, maps={**self.maps, **after})

    def aligned(self, name: str) -> Tensor:
        """The expert's tensor under its maps: in its dtype, or float64 where a matrix is applied."""
        tensor = self.expert(name)
        for touch in self.anatomy.touches.get(name, ()):
            if touch.space in self.maps:
                tensor = self.maps[touch.space](tensor, touch)
        return tensor

    @property
    def changed(self) -> list[str]:
        """The tensors that the maps change."""
        real = {space for space, own in self.maps.items() if not own.is_identity}
        return [name for name, own in self.anatomy.touches.items() if any(t.space in real for t in own)]

    def similarity(self, space: str, units: int) -> Tensor:
        """Inner products of the base's units with the expert's over a space's tensors; [n, n] float32.

        A tensor that is larger than the base's is scaled to its norm: a lock can multiply one.
        """
        total = torch.zeros(units, units)
        for name, touch in self.anatomy.touching(space):
            ours, theirs = (
                tensor.movedim(touch.axis, 0).chunk(touch.parts)[touch.part].reshape(units, -1)
                for tensor in (self.base(name), self.aligned(name))
            )
            size, limit = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (theirs, ours))
            share = limit / size if size > limit else 1.0
            step = max(1, NUMBERS // units)
            for at in range(0, ours.shape[1], step):
                total += share * (ours[:, at : at + step].float() @ theirs[:, at : at + step].float().T)
        return total

    def units(self, space: str) -> int:
        """The number of units of a space of width 1: the stream, or neurons; 0 if no tensor has it."""
        return next((self.base(name).shape[t.axis] // t.parts for name, t in self.anatomy.touching(space)), 0)

    def rows(self, read: Read, layer: str, kind: str) -> Tensor:
        """The rows of a layer's query, key, value or output, its bias as a last column; [units, F] float64.

        Those of the output are the columns of its matrix.
        """
        found = [
            read(name).movedim(touch.axis, 0).chunk(touch.parts)[touch.part].double()
            for name, touch in self.anatomy.touching(f"{layer} {kind}")
        ]
        return torch.cat(
            [part.reshape(len(part), -1) for part in sorted(found, key=lambda t: -t.dim())], dim=1
        )

    def distance(self) -> float:
        """||aligned expert - base||, over all tensors whose axes are known."""
        differences = (self.aligned(name).double() - self.base(name) for name in self.anatomy.touches)
        return math.sqrt(sum(float(own.square().sum()) for own in differences))


def stream_map(pair: Pair) -> UnitMap | None:
    """The order of the stream's units, if it changed."""
    found = pair.maps.get(STREAM)
    return None if found is None or found.is_identity else found
