"""One router that chooses as several do, each on its own texts.

Every expert i has a router W_i, and states x of its texts in the merge; r_i(x) = softmax(W_i x), or the E
sigmoids of a router with those.

Legend: `E` experts of a layer, `H` hidden size, `R` states of one fine-tune's texts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div

from trainmerge.system.minimise import minimise

STEPS = 300
ITERATIONS, TOLERANCE = 1000, 1e-6  # of conjugate gradients, as published


def router_divergence(rows: Tensor, states: Tensor, own: Tensor, sigmoid: bool = False) -> Tensor:
    """Mean over the states [R, H] of KL(r || softmax(W x)), in nats; of sigmoids the sum of E binary ones.

    `rows` [E, H] is W, and `own` [E, H] the router that gives r.
    """
    ours, theirs = states @ rows.T, states @ own.T
    if not sigmoid:
        return kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True)
    p = theirs.sigmoid()
    cross, least = (binary_cross_entropy_with_logits(logits, p, reduction="sum") for logits in (ours, theirs))
    return (cross - least) / len(states)


def least_divergence(
    start: Tensor, states: Sequence[Tensor], own: Sequence[Tensor], sigmoid: bool = False
) -> Tensor:
    """The rows [E, H] with the least sum of divergences over the fine-tunes, by L-BFGS from `start`.

    The sum is convex. It does not change if one vector is added to all rows of a softmax, or along a
    direction that no state has: there the start's part is kept.
    """
    size = torch.stack([x.square().mean() for x in states]).mean().sqrt()
    scaled = [x / size for x in states]
    targets = [w * size for w in own]

    def loss(rows: Tensor) -> Tensor:
        pairs = zip(scaled, targets, strict=True)
        return torch.stack([router_divergence(rows, x, w, sigmoid) for x, w in pairs]).sum()

    return minimise(loss, start * size, STEPS, tolerance=1e-7) / size


def harc(
    start: Tensor, states: Sequence[Tensor], own: Sequence[Tensor], shrink: float, sigmoid: bool = False
) -> Tensor:
    """The rows [E, H] with the least sum of E[(W - W_i) x' H_i(x) (W - W_i) x], by conjugate gradients.

    H_i(x) = diag(r) - r r' is the curvature of the divergence at W = W_i, so this is its second-order
    expansion there. The normal equations are sum_i S_i(W) = sum_i S_i(W_i) with S_i(W) = E[H_i(x) W x x'];
    `shrink` multiplies what is not on the diagonal of each S_i.
    """
    parts = [_curvature(x, w, shrink, sigmoid) for x, w in zip(states, own, strict=True)]
    wanted = torch.stack([part(w) for part, w in zip(parts, own, strict=True)]).sum(0)
    return _solve(lambda rows: torch.stack([part(rows) for part in parts]).sum(0), wanted, start)


def _curvature(states: Tensor, own: Tensor, shrink: float, sigmoid: bool) -> Callable[[Tensor], Tensor]:
    """W -> S(W), both [E, H]."""
    logits = states @ own.T
    r = logits.sigmoid() if sigmoid else logits.softmax(-1)
    diagonal = (r * (1 - r)).T @ states.square() / len(states)

    def apply(rows: Tensor) -> Tensor:
        z = states @ rows.T
        turned = r * (1 - r) * z if sigmoid else r * (z - (r * z).sum(-1, keepdim=True))
        return shrink * (turned.T @ states / len(states)) + (1 - shrink) * diagonal * rows

    return apply


def _solve(operator: Callable[[Tensor], Tensor], wanted: Tensor, start: Tensor) -> Tensor:
    """Conjugate gradients for a symmetric positive semidefinite operator on matrices."""
    found = start.clone()
    left = wanted - operator(found)
    direction, square = left, left.square().sum()
    for _ in range(ITERATIONS):
        if square.sqrt() <= TOLERANCE * wanted.norm():
            break
        turned = operator(direction)
        curve = (direction * turned).sum()
        if curve <= 0:  # nothing but rounding is left
            break
        step = square / curve
        found = found + step * direction
        left = left - step * turned
        before, square = square, left.square().sum()
        direction = left + (square / before) * direction
    return found
