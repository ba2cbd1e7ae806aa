"""The Pareto front of several quadratics over a box.

Every point minimises a smooth Tchebycheff scalarisation (Lin et al., ICML 2024, arXiv 2402.19078), which also
reaches the parts of a front that no weighted sum does; dominated points are removed.

Legend: `M` points, `T` tasks, `n` coordinates, `W` weightings.
"""

from collections.abc import Callable
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from trainmerge.tradeoffs.surrogate import Quadratics

STARTS = 1024
STEPS = 400
SHARP = 0.02  # of the smooth maximum, in units of a task's range
NEAR = 1e-3  # in units of a task's range: points closer than this are merged
LEAST = 0.01  # weight of every task, so that none is sacrificed for no gain


def front(losses: Quadratics, count: int) -> Tensor:
    """About `count` nondominated points [M, n] in [-1, 1]^n."""
    tasks = torch.eye(len(losses.constant), dtype=losses.constant.dtype)
    alone = losses(
        _minimised(losses, lambda found: (tasks * found).sum(-1), len(tasks))
    )  # [T, T]: the payoffs
    best = alone.diagonal()
    size = (alone.max(dim=0).values - best).clamp(min=1e-12)
    weights = lattice(len(tasks), count).to(best)
    weights = LEAST + (1 - len(tasks) * LEAST) * weights

    def smooth(found: Tensor) -> Tensor:
        return SHARP * torch.logsumexp(weights * (found - best) / size / SHARP, dim=-1)

    points = _minimised(losses, smooth, len(weights))
    found = losses(points) / size
    return points[nondominated(found) & _new(found)]


def _new(losses: Tensor) -> Tensor:
    """Which of M points [M, T] are not close to an earlier one, [M] bool."""
    near = torch.cdist(losses, losses) < NEAR
    return ~near.tril(diagonal=-1).any(dim=1)


def _minimised(losses: Quadratics, scalar: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Points [W, n] in the box that minimise scalar(losses [..., W, T]) [..., W], one per weighting.

    Projected Adam from the best of many starts, because the losses need not be convex.
    """
    n = losses.linear.shape[1]
    starts = sobol_points(n, STARTS, seed=0).to(losses.constant)
    values = scalar(losses(starts)[:, None].expand(-1, count, -1))  # [STARTS, W]
    u = starts[values.argmin(dim=0)].requires_grad_(True)
    optimizer = torch.optim.Adam([u], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (u.grad,) = torch.autograd.grad(scalar(losses(u)).sum(), u)
        optimizer.step()
        schedule.step()
        u.data.clamp_(-1, 1)
    return u.detach()


def sobol_points(n: int, count: int, seed: int) -> Tensor:
    """Points spread evenly over [-1, 1]^n, [count, n] float64: a scrambled Sobol sequence."""
    sobol = torch.quasirandom.SobolEngine(n, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    return 2 * sobol.draw(count, dtype=torch.float64) - 1


def lattice(tasks: int, count: int) -> Tensor:
    """At most `count` weightings [W, T], even over the simplex with its corners (Das and Dennis, 1998)."""
    parts = 1
    while comb(parts + tasks, tasks - 1) <= count:
        parts += 1
    bars = combinations(range(parts + tasks - 1), tasks - 1)
    edges = torch.tensor([[-1, *bar, parts + tasks - 1] for bar in bars])
    return (edges.diff(dim=1) - 1) / parts


def nondominated(losses: Tensor) -> Tensor:
    """Which of M points [M, T] are nondominated, [M] bool."""
    no_worse = (losses[:, None] <= losses[None]).all(-1)  # [M, M]: row against column
    better = (losses[:, None] < losses[None]).any(-1)
    return ~(no_worse & better).any(dim=0)
