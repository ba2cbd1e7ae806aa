"""The loss over all calibration examples at the current coefficients."""

from collections.abc import Iterator

import torch
from torch import Tensor

from trainmerge.data.batch import Batch
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.module import MergeModule
from trainmerge.model.resident import Resident
from trainmerge.model.row_shards import shard_rows
from trainmerge.system import distributed


@torch.no_grad()
def calibration_loss(module: MergeModule, data: Calibration) -> float:
    """The weighted loss over all calibration examples at the current coefficients, summed over experts.

    Several processes split every batch.
    """
    module.resident.merged.materialise()
    mine = sum(
        float(module.loss(batch)) * _count(batch) / len(data.examples[batch.expert])
        for batch in batches(module.resident, data)
    )
    return float(
        distributed.all_reduce(torch.tensor(mine, dtype=torch.float64, device=module.resident.device))
    )


def batches(resident: Resident, data: Calibration) -> Iterator[Batch]:
    """One process's part of all calibration examples, expert after expert, on the model's device.

    Every process takes part in every batch, because a batch may contain collectives. With fewer examples than
    processes, the others get an example of share 0.
    """
    for expert, examples in enumerate(data.examples):
        for first in range(0, len(examples), data.batch_size):
            own = examples[first : first + data.batch_size]
            part = shard_rows(len(own), distributed.rank(), distributed.world_size())
            share = (part.stop - part.start) * distributed.world_size() / len(own)
            if not share:
                part = slice(0, 1)
            batch = resident.batch(expert, own[part], data.tokenize, first + part.start)
            yield batch._replace(share=share)


def loss_and_gradient(
    module: MergeModule, batch: Batch, count: int = 1, of: int = 1
) -> tuple[Tensor, Tensor]:
    """A batch's loss times count / of, and its coefficient gradient [K, G]; again if float16 overflows.

    All processes repeat if one overflows, because a forward may contain collectives.
    """
    merged = module.resident.merged
    while True:
        loss = module.loss(batch) * count / of
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = merged.gradient()
        overflowed = (~gradient.isfinite()).sum()
        if merged.loss_scale.active:
            overflowed = distributed.all_reduce(overflowed)
        if merged.loss_scale.settle(not overflowed):
            return loss.detach(), gradient


def _count(batch: Batch) -> float:
    """The number of examples that a loss times the batch's share represents."""
    return len(batch.ids) / batch.share if batch.share else 0.0
