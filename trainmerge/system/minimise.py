"""The minimum of a smooth convex function."""

from collections.abc import Callable

import torch
from torch import Tensor


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, tolerance: float) -> Tensor:
    """The argument with the least loss, by L-BFGS with a strong Wolfe line search.

    Args:
        loss: The function, of a tensor like `start`.
        start: Where it begins; it is not changed.
        steps: Most steps.
        tolerance: The largest entry of the gradient at which it stops.
    """
    found = start.detach().clone().requires_grad_(True)
    solver = torch.optim.LBFGS(
        [found], max_iter=steps, tolerance_grad=tolerance, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss(found)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[no-untyped-call]
    return found.detach()
