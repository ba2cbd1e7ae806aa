"""Rows of a batch: its unmasked positions, the expert's outputs there, and means per example.

Legend: `B` examples, `T` tokens, `P` counted positions of a batch, row-major over its mask.
"""

import torch
from torch import Tensor

from trainmerge.data.batch import Batch, Predictions


def recorded(batch: Batch) -> Predictions:
    """The predictions of the batch's expert.

    Raises:
        ValueError: they were not recorded, though the objective needs them.
    """
    if batch.teacher is None or batch.teacher.predictions is None:
        raise ValueError("the batch has no recorded expert predictions: record the experts first")
    return batch.teacher.predictions


def counted(mask: Tensor) -> Tensor:
    """The unmasked positions of a mask [B, T], as flat indices [P]."""
    return mask.flatten().nonzero().squeeze(1)


def example_mean(rows: Tensor, mask: Tensor) -> Tensor:
    """Mean over each example's unmasked positions: [P], [B, T] -> [B]; 0 if it has none."""
    examples = mask.nonzero()[:, 0]
    sums = torch.zeros(len(mask), dtype=rows.dtype, device=rows.device).index_add(0, examples, rows)
    return sums / mask.sum(dim=1).clamp_min(1)
