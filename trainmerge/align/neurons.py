"""Orders of neurons and of the residual stream by assignment.

Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, section 3.2 (weight matching). Optimal
transport with equal widths and uniform masses (Singh, Jaggi, NeurIPS 2020, EMD) and PLeaS's permutation
(Nasery et al., 2024) are the same assignment; PLeaS's least squares after it is `RegMean`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from trainmerge.align.base import Align, better, nearest_order
from trainmerge.align.families import STREAM
from trainmerge.align.pair import Pair
from trainmerge.align.unit_map import UnitMap


@dataclass(frozen=True)
class Neurons(Align):
    """The neurons of each feed-forward layer in the order that is nearest to the base's.

    Maximises sum_i <w_0,i, w_k,P(i)>, with w the neuron's rows of gate and up and its column of down. Exact
    for the function: rows and columns change places together.
    """

    stage: ClassVar[int] = 2
    units: ClassVar[str] = "neurons"

    @override
    def __call__(self, pair: Pair) -> Mapping[str, UnitMap]:
        return _orders(pair, [f"{layer} neurons" for layer in pair.anatomy.layers])


@dataclass(frozen=True)
class ResidualStream(Align):
    """The units of the residual stream in the order that is nearest to the base's.

    One order for every tensor that reads or writes the stream: embeddings, norms, attention, feed-forward
    layers, heads. For experts of other seeds; needed before their neurons and heads can be compared.
    """

    stage: ClassVar[int] = 0
    units: ClassVar[str] = "units of the residual stream"

    @override
    def __call__(self, pair: Pair) -> Mapping[str, UnitMap]:
        return _orders(pair, [STREAM])


def _orders(pair: Pair, spaces: list[str]) -> dict[str, UnitMap]:
    found = {}
    for space in spaces:
        if units := pair.units(space):
            order, after, before = nearest_order(pair.similarity(space, units))
            if better(after, before):
                found[space] = UnitMap(order)
    return found
