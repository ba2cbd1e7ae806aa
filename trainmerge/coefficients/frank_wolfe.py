"""Frank-Wolfe: merges in the convex hull of the experts; each step moves towards one expert.

A linear function over a simplex is minimal at a vertex, so the linear minimisation oracle is an argmin over
the coefficient gradients. No projection is needed, and the duality gap bounds the remaining improvement
(Jaggi, ICML 2013). FW-Merging (ICCV 2025, arXiv 2503.12649) takes such steps in weight space, its oracle a
cosine.

Legend: `K` experts, `V` vertices (K, plus the base if it is one), `G` coefficient groups.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.coefficients.single_tensor import SingleTensorOptimizer
from trainmerge.system.ranges import check_option


class FrankWolfe(SingleTensorOptimizer):
    """Optimises coefficients [K, G] over a simplex; use it with `constraint: trainmerge.Simplex`.

    Args:
        params: The coefficients; they must start in the set.
        total: The sum of a group's coefficients: the constraint's `total`.
        base: Whether the base is a vertex too, so that they may sum to less: the constraint's `base`.
        shared: One vertex per step for all groups, as the paper's task-wise oracle; else one per group.
        search: Line search by a secant of the slope, exact for a quadratic; takes a second loss per step.
            Otherwise the step size is 2 / (t + 2) in step t = 0, 1, ...
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        total: float = 1.0,
        base: bool = False,
        shared: bool = False,
        search: bool = False,
    ) -> None:
        check_option("FrankWolfe.total", total, float, "(0, inf)")
        for name, value in (("base", base), ("shared", shared), ("search", search)):
            check_option(f"FrankWolfe.{name}", value, bool)
        super().__init__(params, {"total": total, "base": base, "shared": shared, "search": search})

    def gap(self) -> float:
        """The duality gap before the last step: a convex loss is at most this far above its minimum."""
        return float(self.state[self.coefficients]["gap"])

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. The closure computes loss and gradient; with `search` it is called twice."""
        assert closure is not None
        with torch.enable_grad():
            loss = closure()
        here, options = self.coefficients, self.param_groups[0]
        assert here.grad is not None
        state, gradient, start = self.state[here], here.grad.clone(), here.clone()
        state["step"] = state.get("step", torch.zeros(())) + 1
        way = oracle(gradient, options["total"], options["base"], options["shared"]) - start
        slope = torch.sum(gradient * way)
        state["gap"] = -slope
        if not options["search"]:
            here.add_(2 / (float(state["step"]) + 1) * way)
            return loss
        here.copy_(start + way)
        with torch.enable_grad():
            closure()
        bend = torch.sum(here.grad * way) - slope
        share = (-slope / bend).clamp(0, 1) if bend > 0 else torch.ones_like(slope)
        here.copy_(start + share * way)
        return loss


def oracle(gradient: Tensor, total: float = 1.0, base: bool = False, shared: bool = False) -> Tensor:
    """The vertex of the simplex that minimises <gradient, vertex>, both [K, G]; the base is all zeros."""
    if shared:
        gradient = gradient.sum(dim=1, keepdim=True).expand_as(gradient)
    vertices = torch.cat([gradient, torch.zeros_like(gradient[:1])]) if base else gradient  # [V, G]
    best = torch.nn.functional.one_hot(vertices.argmin(dim=0), len(vertices)).T
    return total * best[: len(gradient)].to(gradient)
