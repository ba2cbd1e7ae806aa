"""Aggregate the experts' coefficient gradients, one row per expert, when objectives conflict.

The rules are TorchJD's aggregators (`torchjd.aggregation`: Mean, PCGrad, MGDA, CAGrad, UPGrad, ...), or any
module that maps [m, n] to [n]. A fit gives them the gradients of the values that the optimizer moves, so that
a rule's promise (to first order no task's loss rises) holds for the step: under `Sigmoid` rows are multiplied
by its slope first. Groups with fixed coefficients are 0.

Legend: `m` rows, one per expert's loss; `K` experts, `G` coefficient groups, n = K * G.
"""

import torch
from torch import Tensor, nn


def aggregate_gradients(rows: Tensor, rule: nn.Module, seed: int) -> Tensor:
    """One gradient [K, G] of rows [m, K, G].

    Random rules (PCGrad's order) are seeded with `seed`, so that a resumed run and every process of a fit
    draw the same; the global random state is restored. Rules compute in the rows' dtype, without autocast.

    Raises:
        ValueError: the rule did not return one row.
    """
    exact = torch.autocast(rows.device.type, enabled=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), exact:
        torch.manual_seed(seed)
        row: Tensor = rule(rows.flatten(1))
    if row.shape != rows[0].flatten().shape:
        raise ValueError(
            f"{type(rule).__name__} returned {tuple(row.shape)} for rows {tuple(rows.flatten(1).shape)}; a "
            "rule maps [m, n] to [n]"
        )
    return row.view(rows.shape[1:])
