"""Undo changes of scale between the up and down rows of gated feed-forward layers.

In down(act(gate x) * (up x)), neuron i's row of up may be multiplied by any s and its column of down divided
by s: the function stays the same, and the task vector is large. Layers without a gate (BERT, GPT-2, ViT) do
not permit it: their activation is not homogeneous.

Legend: `I` neurons of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.align.base import Align
from trainmerge.align.pair import Pair
from trainmerge.align.unit_map import UnitMap
from trainmerge.system.ranges import check_fields

MOST = 0.25  # of a layer's squared distance that may be left, for its scales to be undone


@dataclass(frozen=True)
class NeuronScales(Align):
    """Undo scales of neurons: s times the row u of up, and the column d of down divided by s.

    s > 0 minimises |s u - u_0|^2 + |d / s - d_0|^2 exactly, as a root of a polynomial of degree four. Only in
    layers where this removes three quarters of the neurons' squared distance; training alone changes
    scales too, but not by much.

    Args:
        always: In every layer.
    """

    stage: ClassVar[int] = 3
    repeated: ClassVar[bool] = False

    always: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "NeuronScales")

    @override
    def __call__(self, pair: Pair) -> Mapping[str, UnitMap]:
        found: dict[str, UnitMap] = {}
        for layer in pair.anatomy.layers:
            if not any(pair.anatomy.touching(f"{layer} up")):
                continue
            up, up0 = (pair.rows(read, layer, "up") for read in (pair.aligned, pair.base))
            down, down0 = (pair.rows(read, layer, "down") for read in (pair.aligned, pair.base))
            scales = nearest_scales(up, up0, down, down0)
            ones = torch.ones_like(scales)
            before, after = (float(distances(s, up, up0, down, down0).sum()) for s in (ones, scales))
            if after < before * (1.0 if self.always else MOST):
                order = torch.arange(len(scales))
                found[f"{layer} up"] = UnitMap(order, scales[:, None, None])
                found[f"{layer} down"] = UnitMap(order, 1 / scales[:, None, None])
        return found


def distances(scales: Tensor, up: Tensor, up0: Tensor, down: Tensor, down0: Tensor) -> Tensor:
    """|s u - u_0|^2 + |d / s - d_0|^2 of each neuron, [I]."""
    s = scales[:, None]
    return (s * up - up0).square().sum(1) + (down / s - down0).square().sum(1)


def nearest_scales(up: Tensor, up0: Tensor, down: Tensor, down0: Tensor) -> Tensor:
    """The s > 0 of each neuron with the least distance, [I] float64; 1 for a neuron of zeros.

    Zeros of the derivative are roots of |u|^2 s^4 - <u, u_0> s^3 + <d, d_0> s - |d|^2.
    """
    a, b = up.square().sum(1), (up * up0).sum(1)
    c, d = down.square().sum(1), (down * down0).sum(1)
    solid = (a > 0) & (c > 0)
    a, b, c, d = (torch.where(solid, own, own.new_ones(())) for own in (a, b, c, d))
    companion = a.new_zeros(len(a), 4, 4)
    companion[:, 1:, :3] = torch.eye(3, dtype=a.dtype)
    companion[:, 0] = torch.stack([b / a, torch.zeros_like(a), -d / a, c / a], dim=1)
    roots = torch.linalg.eigvals(companion)
    real = (roots.imag.abs() <= 1e-6 * roots.abs()) & (roots.real > 0)
    candidates = torch.where(real, roots.real, 1.0)
    tried = torch.stack([distances(own, up, up0, down, down0) for own in candidates.T])
    best = candidates.T.gather(0, tried.argmin(0, keepdim=True))[0]
    return torch.where(solid, best, 1.0)
