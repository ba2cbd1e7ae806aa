"""DERN-like merging (arXiv 2509.10377): neurons of dropped experts go one by one to the nearest kept neuron.

There is no public code, and its thresholds are not stated: here no neuron is thrown away, a neuron's features
are its weights and values, and a kept neuron becomes the mean of itself and what went to it, weighted by the
experts' saliencies.

Legend: `M` kept experts, `I` width of an expert, `F` features of a neuron.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def nearest_neurons(kept: Sequence[Tensor], dropped: Sequence[Tensor]) -> list[Tensor]:
    """For each neuron of each dropped expert [I, F], the nearest one of all kept experts: [I].

    The number `place * I + i` is neuron i of the kept expert at that place. Near is a large inner product.
    """
    together = torch.cat(list(kept))
    return [(own @ together.T).argmax(1) for own in dropped]


def absorbed(
    kept: Sequence[Tensor], dropped: Sequence[Tensor], homes: Sequence[Tensor], weights: Sequence[float]
) -> list[Tensor]:
    """The kept experts' neurons [I, ...] after, as the means of themselves and what went to them.

    Args:
        kept: A matrix of each kept expert, its neurons first.
        dropped: The same of the dropped ones.
        homes: `nearest_neurons`.
        weights: Of the kept experts, then of the dropped ones.
    """
    width = len(kept[0])
    total = torch.cat([weight * own.double() for weight, own in zip(weights, kept, strict=False)])
    sums = torch.tensor(weights[: len(kept)], dtype=torch.float64).repeat_interleave(width)
    for own, home, weight in zip(dropped, homes, weights[len(kept) :], strict=True):
        total.index_add_(0, home, weight * own.double())
        sums.index_add_(0, home, torch.full((len(own),), weight, dtype=torch.float64))
    means = total / sums.view(-1, *[1] * (total.dim() - 1))
    reached = torch.zeros(len(total), dtype=torch.bool)
    reached[torch.cat([*homes, torch.empty(0, dtype=torch.long)])] = True
    first = torch.cat(list(kept))
    means = torch.where(reached.view(-1, *[1] * (total.dim() - 1)), means.to(first.dtype), first)
    return list(torch.split(means, width))
