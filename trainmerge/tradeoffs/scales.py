"""One scale per expert as coordinates for many coefficients.

Legend: `K` experts, `G` coefficient groups, `T` tasks (one per expert).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.calibration_loss import batches, loss_and_gradient
from trainmerge.fitting.module import MergeModule


def scaled(coefficients: Tensor, scales: Tensor) -> Tensor:
    """Coefficients [K, G], each expert's multiplied by its scale [K]."""
    return coefficients * scales.to(coefficients)[:, None]


def losses_at(
    module: MergeModule, data: Calibration, coefficients: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Every task's loss over its calibration examples [T], and its gradient in the scales [T, K]; float64.

    One forward and backward per example; the gradient follows from the coefficient gradient by the chain
    rule.
    """
    module.coefficients.reset_(scaled(coefficients, scales))
    module.resident.merged.materialise()
    losses = torch.zeros(len(data.examples), dtype=torch.float64)
    slopes = torch.zeros(len(data.examples), len(coefficients), dtype=torch.float64)
    for batch in batches(module.resident, data):
        loss, gradient = loss_and_gradient(module, batch, len(batch.ids), len(data.examples[batch.expert]))
        losses[batch.expert] += loss.cpu().double()
        slopes[batch.expert] += (gradient.cpu().double() * coefficients.cpu().double()).sum(dim=1)
    return losses, slopes


def named(names: tuple[str, ...], values: Tensor) -> Mapping[str, float]:
    """Name -> value."""
    return dict(zip(names, values.tolist(), strict=True))
