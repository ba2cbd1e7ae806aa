"""Sub-MoE (arXiv 2506.23266): k-means of the experts' mean outputs, and a mean within the group's subspace.

There is no public code. What its paper states is here: clusters of outputs, means weighted by usage, and the
joint decomposition of a group, whose truncation is a projection of that mean. Not here: two layers clustered
together, which does not fit one number of experts per layer.

Legend: `E` experts of a layer, `H` hidden size, `O` rows of a matrix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 100


def k_means(outputs: Tensor, usage: Tensor, clusters: int) -> list[list[int]]:
    """Clusters of the experts' mean outputs [E, H], the most used expert [E] of each first.

    Begins at the most used expert, then always at the one that is farthest from all chosen; ties go to the
    lower number, so the result is a function of the inputs.
    """
    chosen = [int(usage.argmax())]
    apart = torch.cdist(outputs, outputs)
    while len(chosen) < clusters:
        nearest = apart[:, chosen].amin(1)
        nearest[chosen] = -1.0  # of equal outputs too, every cluster begins with another expert
        chosen.append(int(nearest.argmax()))
    means, of = outputs[chosen], None
    for _ in range(ROUNDS):
        now = torch.cdist(outputs, means).argmin(1)
        now[chosen] = torch.arange(clusters)  # no cluster loses the expert that it began with
        if of is not None and torch.equal(of, now):
            break
        of = now
        means = torch.stack([outputs[of == place].mean(0) for place in range(clusters)])
    assert of is not None
    found = [(of == place).nonzero()[:, 0].tolist() for place in range(clusters)]
    return sorted(sorted(own, key=lambda number: (-float(usage[number]), number)) for own in found)


def projected(mean: Tensor, members: Sequence[Tensor], rank: int) -> Tensor:
    """U_r U_r^T mean [O, ...], with U_r the leading left singular vectors of the members side by side.

    With [W_1 ... W_n] = U S [V_1 ... V_n]^T, Sub-MoE takes U_r S_r times the weighted mean of the V_e: this.
    """
    together = torch.cat([own.float() for own in members], dim=1)
    left = torch.linalg.eigh(together @ together.T).eigenvectors[:, -rank:]
    found: Tensor = left @ (left.T @ mean.float())
    return found
