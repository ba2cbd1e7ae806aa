"""Expert weights -> equivalent expert weights that line up with the base, before task vectors are taken."""

from trainmerge.align.align import Aligned, align
from trainmerge.align.base import Align
from trainmerge.align.families import FAMILIES, STREAM, touches_of
from trainmerge.align.gauge import Gauge
from trainmerge.align.heads import AttentionHeads
from trainmerge.align.neurons import Neurons, ResidualStream
from trainmerge.align.pair import Anatomy, Pair, anatomy, stream_map
from trainmerge.align.products import changes, is_locked
from trainmerge.align.scales import NeuronScales

__all__ = [
    "FAMILIES",
    "STREAM",
    "Align",
    "Aligned",
    "Anatomy",
    "AttentionHeads",
    "Gauge",
    "NeuronScales",
    "Neurons",
    "Pair",
    "ResidualStream",
    "align",
    "anatomy",
    "changes",
    "is_locked",
    "stream_map",
    "touches_of",
]
