"""Which neurons of two experts do the same.

Legend: `H` hidden size, `I` width of an expert, `S` tokens.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainmerge.align.assignment import assign
from trainmerge.mixtures.experts import neuron_values
from trainmerge.mixtures.saliency import Saliency


def neurons(matrices: Mapping[str, Tensor], own: Saliency) -> tuple[Tensor, Tensor]:
    """Two features of every neuron, of norm 1: its weights [I, 3 H], and values at the kept states [I, S].

    Args:
        matrices: The expert's `gate` and `up` [I, H], `down` [H, I], and their biases if it has some.
        own: The layer's sums.
    """
    weights = torch.cat([matrices["gate"], matrices["up"], matrices["down"].T], dim=1).float()
    values = neuron_values(matrices, own.states, own.gating)
    return normalize(weights, dim=1), normalize(values.T, dim=1)


def matching_order(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """The order of the other's neurons with the largest sum of cosines with the first's, of both features."""
    return assign(-(one[0] @ other[0].T + one[1] @ other[1].T))
