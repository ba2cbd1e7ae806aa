"""Newton's method for coefficients: conjugate gradients within a trust region.

The loss is nearly quadratic in the K x G coefficients, which are few, so its curvature is worth measuring.
A product of the Hessian with a direction is the difference of two gradients, which is exact for a quadratic.
It takes one more forward and backward of the merge. A double backward or a forward mode would need every
operator's second derivative, and the merge in the network's graph; this holds for all models and objectives.

Steihaug, SIAM J. Numer. Anal. 20 (1983); Nocedal and Wright, Numerical Optimization (2006), algorithms 4.1
and 7.2.

Legend: `K` experts, `G` coefficient groups.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.coefficients.single_tensor import SingleTensorOptimizer
from trainmerge.system.ranges import check_option

ENOUGH = 1e-4  # of the predicted fall of the loss: less is no step
POOR, GOOD = 0.25, 0.75  # shares of it at which the trust region shrinks and grows


class NewtonCG(SingleTensorOptimizer):
    """Optimises coefficients [K, G] by Newton steps on each step's own batch; the loss never rises on it.

    Each step evaluates the loss and its gradient at most `products` + 2 times: give it larger batches than a
    first-order optimizer, and fewer steps. `trainmerge.StopOnHeldOut` ends the fit. With `combine` the
    gradient is not that of the loss, so the differences are no curvature.

    Args:
        params: The coefficients.
        products: Conjugate-gradient iterations per step at most: G x K of them solve a quadratic.
        radius: The longest first step, the Euclidean norm over all coefficients; later ones adapt.
        difference: The distance, in that norm, of the two gradients whose difference gives a product.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        products: int = 10,
        radius: float = 1.0,
        difference: float = 0.05,
    ) -> None:
        check_option("NewtonCG.products", products, int, "[1, inf)")
        check_option("NewtonCG.radius", radius, float, "(0, inf)")
        check_option("NewtonCG.difference", difference, float, "(0, inf)")
        super().__init__(params, {"products": products, "radius": radius, "difference": difference})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. The closure computes loss and gradient, of the same batch each time."""
        assert closure is not None
        here = self.coefficients
        options, state = self.param_groups[0], self.state[here]
        start, radius = here.clone(), float(state.get("radius", options["radius"]))

        def at(point: Tensor) -> tuple[Tensor, Tensor]:
            here.copy_(point)
            with torch.enable_grad():
                loss = closure()
            assert here.grad is not None
            return torch.as_tensor(loss).detach(), here.grad.clone()

        def product(direction: Tensor) -> Tensor:
            reach = options["difference"] / direction.norm()
            curved: Tensor = (at(start + reach * direction)[1] - gradient) / reach
            return curved

        loss, gradient = at(start)
        move = least_within(gradient, product, radius, options["products"])
        fall = float(loss) - float(at(start + move.by)[0])
        share = fall / move.fall if move.fall > 0 else 0.0
        if not share >= ENOUGH:  # or not a number
            here.copy_(start)
        length = float(move.by.norm())
        if not share >= POOR:
            state["radius"] = POOR * length if length > 0 else radius
        else:
            state["radius"] = max(radius, 2 * length) if share > GOOD and move.bounded else radius
        here.grad = gradient
        return loss


class Move(NamedTuple):
    """A step by `by`, the fall of the loss that the quadratic predicts, and whether the radius bounds it."""

    by: Tensor
    fall: float
    bounded: bool


def least_within(gradient: Tensor, product: Callable[[Tensor], Tensor], radius: float, products: int) -> Move:
    """The least of <g, d> + <d, H d> / 2 in |d| <= radius, by at most so many products H p.

    Stops at the boundary along a direction of negative curvature, or when the residual is small.
    """
    by, bent = torch.zeros_like(gradient), torch.zeros_like(gradient)  # d, H d
    residual, way = gradient.clone(), -gradient
    size = float(residual.norm())
    enough = size * min(0.5, size**0.5) * 1e-3
    bounded = False
    for _ in range(products):
        if float(residual.norm()) <= enough:
            break
        curved = product(way)
        curvature, squared = float((way * curved).sum()), float(residual.square().sum())
        length = squared / curvature if curvature > 0 else float("inf")
        most = boundary(by, way, radius)
        bounded = not length < most
        length = min(length, most)
        by, bent, residual = by + length * way, bent + length * curved, residual + length * curved
        if bounded:
            break
        way = -residual + float(residual.square().sum()) / squared * way
    fall = -float((gradient * by).sum()) - 0.5 * float((by * bent).sum())
    return Move(by, fall, bounded)


def boundary(by: Tensor, way: Tensor, radius: float) -> float:
    """The t >= 0 with |by + t way| = radius, for |by| <= radius.

    >>> boundary(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0]), 5.0)
    2.0
    """
    a, b = float(way.square().sum()), float((by * way).sum())
    left = radius**2 - float(by.square().sum())
    return float((max(b * b + a * left, 0.0) ** 0.5 - b) / a)
