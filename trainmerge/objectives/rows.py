"""Rows of a batch: positions that its mask counts, the expert's signals there, and means per example.

Legend: `B` examples, `T` tokens, `P` counted positions of a batch, row-major over its mask.
"""

import torch
from torch import Tensor

from trainmerge.data.batch import Batch, Predictions


def recorded(batch: Batch) -> Predictions:
    """What the batch's expert predicts.

    Raises:
        ValueError: it was not recorded, though the objective asks for it.
    """
    if batch.teacher is None or batch.teacher.predictions is None:
        raise ValueError("the batch has no teacher's predictions: record the experts first")
    return batch.teacher.predictions


def counted(mask: Tensor) -> Tensor:
    """The counted positions of a mask [B, T], as places in it flattened -> [P]."""
    return mask.flatten().nonzero().squeeze(1)


def example_mean(rows: Tensor, mask: Tensor) -> Tensor:
    """Mean over each example's counted positions: [P], [B, T] -> [B]; 0 where none counts."""
    examples = mask.nonzero()[:, 0]
    sums = torch.zeros(len(mask), dtype=rows.dtype, device=rows.device).index_add(0, examples, rows)
    return sums / mask.sum(dim=1).clamp_min(1)
