"""Adam whose step of a coefficient is divided by the length of what the coefficient multiplies."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from typing_extensions import override

from tests.bench.suite_model import demo


class ScaledAdam(torch.optim.Adam):
    """For the demo's coefficients, one a tensor and expert: W then moves as far in each; mean scale one."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        opened = demo().open()
        lengths = torch.ones(len(opened.task_vectors.experts), len(opened.layout.labels))
        for name, groups in opened.layout.groups.items():
            norms = opened.task_vectors.deltas[name].dense().flatten(1).norm(dim=1)
            lengths[:, list(groups)] = norms[:, None].float()
        self.scale = lengths.mean() / lengths.clamp_min(1e-3 * float(lengths.mean()))

    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Adam's step, scaled."""
        (coefficients,) = self.param_groups[0]["params"]
        before = coefficients.detach().clone()
        loss = super().step(closure)
        with torch.no_grad():
            coefficients.copy_(before + self.scale.to(before) * (coefficients - before))
        return loss
