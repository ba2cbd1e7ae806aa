"""Rows of a batch: its unmasked positions, the expert's outputs there, and means per example.

Legend: `B` examples, `T` tokens, `P` counted positions of a batch, row-major over its mask, `R` rows.
"""

import torch
from torch import Tensor

from trainmerge.data.batch import Batch, Kind, Outputs, Predictions
from trainmerge.objectives.divergence import divergence


def expert_predictions(batch: Batch) -> Predictions:
    """The predictions of the batch's expert.

    Raises:
        ValueError: they were not recorded, though the objective needs them.
    """
    if batch.teacher is None or batch.teacher.predictions is None:
        raise ValueError("the batch has no recorded expert predictions: record the experts first")
    return batch.teacher.predictions


def expert_divergence(outputs: Outputs, batch: Batch, temperature: float = 1.0) -> Tensor:
    """KL(expert || merge) of the batch's predictions per example, [B].

    The mean over counted tokens, or over begin and end of an answer; the sum over independent labels, which
    is the divergence of their joint distribution.
    """
    told = expert_predictions(batch)
    if outputs.kind == "tokens":
        rows = divergence(told, outputs.logits, counted(batch.mask), temperature)
        return example_mean(rows, batch.mask)
    if outputs.kind == "spans":  # recorded as wide as the longest example
        told = told._replace(log_p=told.log_p[:, : outputs.logits.shape[-1]])
    return reduced(divergence(told, outputs.logits, None, temperature), outputs.kind, len(batch.ids))


def reduced(rows: Tensor, kind: Kind, examples: int) -> Tensor:
    """One number per example [B] from its rows [R] or [B, ...]: one, begin and end, or one per label."""
    of_each = rows.reshape(examples, -1)
    return of_each.sum(dim=1) if kind == "labels" else of_each.mean(dim=1) if kind == "spans" else rows


def counted(mask: Tensor) -> Tensor:
    """The unmasked positions of a mask [B, T], as flat indices [P]."""
    return mask.flatten().nonzero().squeeze(1)


def example_mean(rows: Tensor, mask: Tensor) -> Tensor:
    """Mean over each example's unmasked positions: [P], [B, T] -> [B]; 0 if it has none."""
    examples = mask.nonzero()[:, 0]
    sums = torch.zeros(len(mask), dtype=rows.dtype, device=rows.device).index_add(0, examples, rows)
    return sums / mask.sum(dim=1).clamp_min(1)
