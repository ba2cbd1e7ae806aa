"""Aggregates the experts' coefficient gradients, one row per expert, where objectives conflict.

The rules are TorchJD's aggregators (`torchjd.aggregation`: Mean, PCGrad, MGDA, CAGrad, UPGrad, ...), or any
module that maps [m, n] to [n].

Legend: `m` rows, one an expert's loss; `K` experts, `G` coefficient groups, n = K * G.
"""

import torch
from torch import Tensor, nn


def combined(rows: Tensor, rule: nn.Module, seed: int) -> Tensor:
    """One gradient [K, G] of rows [m, K, G].

    Rules that throw dice (PCGrad's order) throw them from `seed`, so that a resumed run, and every process of
    a fit, throws the same; the dice of others are left as they were.

    Raises:
        ValueError: the rule gave something else than one row.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        row: Tensor = rule(rows.flatten(1))
    if row.shape != rows[0].flatten().shape:
        raise ValueError(
            f"{type(rule).__name__} made {tuple(row.shape)} of rows {tuple(rows.flatten(1).shape)}; "
            "a rule maps [m, n] to [n]"
        )
    return row.view(rows.shape[1:])
