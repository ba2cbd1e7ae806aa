"""CAMERA's energy (arXiv 2508.02322) as an importance of experts.

CAMERA drops neurons, which makes widths uneven: no ordinary checkpoint can say that. Its energy of a neuron,

    |w_down,i|^2 ((1 - alpha) |phi_i|_2^2 + alpha |phi_i|_inf^2)

with phi_i the neuron's values times the expert's weights over the tokens, summed over an expert's neurons,
orders experts here.

Legend: `H` hidden size, `I` width of an expert, `R` tokens of an expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainmerge.checkpoints import Checkpoint
from trainmerge.mixtures.experts import neuron_values
from trainmerge.mixtures.layers import MixtureLayer
from trainmerge.mixtures.saliency import Saliency

ALPHA = 0.9


def energies(values: Sequence[Tensor], down: Sequence[Tensor], alpha: float = ALPHA) -> list[Tensor]:
    """The energy [I] of every neuron, by expert.

    Args:
        values: phi of each expert, [R, I]; R may be 0.
        down: Their last matrices, [H, I].
        alpha: The share of the largest value.
    """
    found = []
    for phi, last in zip(values, down, strict=True):
        squares = phi.double().square()
        largest = squares.amax(0) if len(squares) else squares.sum(0)
        size = (1 - alpha) * squares.sum(0) + alpha * largest
        found.append(last.double().square().sum(0) * size)
    return found


def expert_energies(base: Checkpoint, layer: MixtureLayer, own: Saliency) -> Tensor:
    """Each expert's sum, [E], over the tokens that are kept."""
    sums = []
    for number in range(layer.experts):
        token, place = (own.chosen == number).nonzero(as_tuple=True)
        matrices = {kind: layer.read(base, number, kind) for kind in layer.kinds}
        phi = neuron_values(matrices, own.states[token], own.gating) * own.weights[token, place, None].float()
        sums.append(energies([phi], [matrices["down"]])[0].sum())
    return torch.stack(sums)
