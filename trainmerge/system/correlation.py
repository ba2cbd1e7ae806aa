"""Correlations of two lists of numbers.

Legend: `P` numbers.
"""

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, [P] float64; equal values share the mean of theirs, and NaN stays NaN.

    >>> ranks(torch.tensor([0.5, 0.1, 0.5, 0.9])).tolist()
    [2.5, 1.0, 2.5, 4.0]
    """
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    averages: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return averages[places].masked_fill(values.isnan(), float("nan"))


def standardised(values: Tensor) -> Tensor:
    """Mean 0 and mean square 1, [P]; 0 where all are equal, so that their correlation is 0."""
    if bool((values == values[:1]).all()):
        return torch.zeros_like(values)
    apart = values - values.mean()
    return apart / apart.square().mean().sqrt()


def rank_terms(one: Tensor, other: Tensor) -> Tensor:
    """Each pair's contribution to Spearman's correlation of two lists, [P], [P] -> [P]; their mean is it.

    Spearman's correlation is Pearson's of ranks; 0 if all of one list are equal.
    """
    return standardised(ranks(one)) * standardised(ranks(other))


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's correlation of two lists [P]; NaN for fewer than two numbers, or if one is not a number."""
    return float(rank_terms(one, other).mean()) if len(one) > 1 else float("nan")
