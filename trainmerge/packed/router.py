"""Which task a text is of, without labels of that task: the nearest class mean under a shared covariance.

The tasks' calibration texts are the classes. With means mu_t and the covariance S within the tasks, a row x
belongs to the largest x S^-1 mu_t - mu_t S^-1 mu_t / 2 (Fisher's linear discriminant, equal priors). S is
shrunk towards a multiple of the identity by D / (N + D), because D may be larger than N.

Legend: `N` texts, `D` width of a row, `K` tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskRouter:
    """A linear classifier of rows."""

    weight: Tensor  # [K, D] float32
    bias: Tensor  # [K] float32

    def __call__(self, rows: Tensor) -> Tensor:
        """The task of each row, [N, D] -> [N]."""
        return (rows.float() @ self.weight.T + self.bias).argmax(dim=1)

    def parts(self) -> Mapping[str, Tensor]:
        """Its tensors by their names in the file."""
        return {"router/weight": self.weight, "router/bias": self.bias}


def fit_router(rows: Sequence[Tensor]) -> TaskRouter:
    """Fit to the rows [N_t, D] of each task."""
    means = torch.stack([own.double().mean(dim=0) for own in rows])
    centred = torch.cat([own.double() - mean for own, mean in zip(rows, means, strict=True)])
    count, width = centred.shape
    covariance = centred.T @ centred / count
    share = width / (count + width)
    size = max(float(covariance.trace()) / width, 1e-30)
    shrunk = (1 - share) * covariance + share * size * torch.eye(width, dtype=torch.float64)
    weight = torch.linalg.solve(shrunk, means.T).T
    return TaskRouter(weight.float(), (-0.5 * (weight * means).sum(dim=1)).float())
