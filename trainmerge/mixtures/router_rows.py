"""A router's rows from labelled states: multinomial logistic regression.

Legend: `R` states, `N` experts, `H` hidden size.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainmerge.system.minimise import minimise

RIDGE = 1e-3
STEPS = 200


def fit_router_rows(states: Tensor, experts: Tensor, count: int, ridge: float = RIDGE) -> Tensor:
    """The rows [N, H], float32, that tell by softmax(W x) which expert a state x is from.

    The minimum of the mean cross-entropy, every expert weighing the same, plus ridge/2 |W|^2 s with s the
    states' mean square. It is convex; L-BFGS, from 0. The rows sum to 0.

    Args:
        states: [R, H].
        experts: The expert of each state, [R].
        count: `N`.
        ridge: Its weight.
    """
    wide = states.float()
    size = wide.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    wide = wide / size
    weights = torch.bincount(experts, minlength=count).float().clamp_min(1).reciprocal()

    def loss(rows: Tensor) -> Tensor:
        return cross_entropy(wide @ rows.T, experts, weights) + ridge / 2 * rows.square().sum()

    start = torch.zeros(count, wide.shape[1], device=wide.device)
    return minimise(loss, start, STEPS, tolerance=1e-6) / size


def accuracy(rows: Tensor, states: Tensor, experts: Tensor) -> float:
    """The share of states whose own expert has the largest logit; every expert weighs the same."""
    right = (states.float() @ rows.T).argmax(dim=-1) == experts
    shares = [right[experts == k].float().mean() for k in range(len(rows)) if bool((experts == k).any())]
    return float(torch.stack(shares).mean())
