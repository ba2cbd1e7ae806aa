"""Line an expert up with its base: coordinate descent over permutations, then gauges."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from trainmerge.align.base import Align
from trainmerge.align.families import STREAM
from trainmerge.align.heads import AttentionHeads
from trainmerge.align.neurons import Neurons, ResidualStream
from trainmerge.align.pair import Pair

SWEEPS = 100
LARGEST = {torch.bfloat16: 1e3, torch.float16: 1e3, torch.float32: 1e6}  # condition of a gauge


class Aligned(NamedTuple):
    """An expert in line with its base, and what was done."""

    pair: Pair
    before: float  # ||expert - base||
    after: float
    moved: dict[str, str]  # kind of unit -> "moved of all"
    gauges: int  # layers' pairs of factors with another gauge

    @property
    def is_identity(self) -> bool:
        """Whether nothing was changed."""
        return not self.moved and not self.gauges


def align(pair: Pair, methods: Sequence[Align]) -> Aligned:
    """Apply the methods by their stages; those that order units again until no unit moves.

    The result is the expert as it is unless its distance from the base became smaller.

    Raises:
        ValueError: undoing a gauge would multiply the rounding of the files too much.
    """
    start, before = pair, pair.distance()
    ordered = sorted(methods, key=lambda method: method.stage)
    for _ in range(SWEEPS):
        found = 0
        for method in (one for one in ordered if one.repeated):
            maps = method(pair)
            pair, found = pair.with_maps(maps), found + len(maps)
        if not found:
            break
    for method in (one for one in ordered if not one.repeated):
        pair = pair.with_maps(method(pair))
    _check_condition(pair)
    after = pair.distance() if pair.changed else before
    if after >= before:
        return Aligned(start, before, before, {}, 0)
    return Aligned(pair, before, after, *_summary(pair))


def _summary(pair: Pair) -> tuple[dict[str, str], int]:
    """Kind of unit -> how many moved, and the number of pairs of factors with another gauge."""
    moved, total = Counter[str](), Counter[str]()
    names = {STREAM: ResidualStream.units, "neurons": Neurons.units, "query": AttentionHeads.units}
    for space, own in pair.maps.items():
        if kind := names.get(space.rpartition(" ")[2]):
            moved[kind] += own.moved
            total[kind] += len(own.order)
    gauges = sum(
        own.matrices is not None for s, own in pair.maps.items() if s.endswith((" key", " value", " up"))
    )
    return {kind: f"{count} of {total[kind]}" for kind, count in moved.items() if count}, gauges


def _check_condition(pair: Pair) -> None:
    for space, own in pair.maps.items():
        if own.matrices is None:
            continue
        name = next(name for name, _ in pair.anatomy.touching(space))
        limit = LARGEST.get(pair.expert(name).dtype)
        found = float(torch.linalg.cond(own.matrices).max())
        if limit and not found <= limit:
            raise ValueError(
                f"{name}: undoing the gauge of its {space.rpartition(' ')[2]} heads has the condition "
                f"{found:.1e}, which would multiply the rounding of {pair.expert(name).dtype} by that: leave "
                "Gauge out, or get the expert as it was trained"
            )
