"""A fit that did not help says so, and with `keep_better` leaves the coefficients where they started."""

import json
import math
import warnings
from collections.abc import Iterator

import torch
from rich.progress import track
from torch import Tensor

from trainmerge import processes
from trainmerge.batch import Batch
from trainmerge.calibration import Calibration
from trainmerge.coefficients import save_coefficients
from trainmerge.folders import write_whole
from trainmerge.held import held_rows
from trainmerge.module import MergeModule
from trainmerge.run_folder import RunFolder

ENOUGH = 5  # later steps, before their losses say anything: batches differ


@torch.no_grad()
def calibration_loss(module: MergeModule, data: Calibration) -> float:
    """The weighted loss over all calibration examples at the present coefficients, summed over experts.

    Several processes take their parts of every batch.
    """
    module.resident.merged.materialise()
    mine = sum(
        float(module.loss(batch)) * _count(batch) / len(data.examples[batch.expert])
        for batch in batches(module, data)
    )
    return float(processes.total(torch.tensor(mine, dtype=torch.float64, device=module.resident.device)))


def batches(module: MergeModule, data: Calibration) -> Iterator[Batch]:
    """All calibration examples, expert after expert, on the model's device: this process's part.

    All processes take part in every batch, in which they may meet: with an example of share 0, where there
    are fewer than processes.
    """
    for expert, examples in enumerate(data.examples):
        for first in range(0, len(examples), data.batch_size):
            own = examples[first : first + data.batch_size]
            part = held_rows(len(own), processes.rank(), processes.count())
            share = (part.stop - part.start) * processes.count() / len(own)
            if not share:
                part = slice(0, 1)
            batch = module.resident.batch(expert, own[part], data.tokenize, first + part.start)
            yield batch._replace(share=share)


def _count(batch: Batch) -> float:
    """How many examples a loss that was multiplied by the batch's share stands for."""
    return len(batch.ids) / batch.share if batch.share else 0.0


def keep_the_better(module: MergeModule, data: Calibration, folder: RunFolder) -> None:
    """Compare start and end on all calibration examples; leave the better one in the run folder."""
    end = module.coefficients().detach().cpu().clone()  # not the parameter itself, which `load` may write
    module.load(data)
    points = {"start": module.start, "end": end}
    losses = {}
    quiet = processes.rank() > 0
    for point in track(points, description="comparing start and end", disable=quiet):
        losses[point] = _loss_at(module, data, points[point])
    better = "end" if losses["end"] < losses["start"] else "start"
    module.coefficients.reset_(points[better])
    if processes.rank() == 0:
        _leave(module, folder, losses, better)


def _leave(module: MergeModule, folder: RunFolder, losses: dict[str, float], better: str) -> None:
    write_whole(folder.path / "calibration_loss.json", json.dumps(losses, indent=2))
    print(f"loss over all calibration examples: {losses['start']:.4f} -> {losses['end']:.4f}")
    if better == "end":
        return
    save_coefficients(module.coefficients, folder.coefficients)
    warnings.warn(
        f"the loss over the calibration examples did not fall ({losses['start']:.4f} -> "
        f"{losses['end']:.4f}): the coefficients are left where they started. Lower the learning rate, or "
        "give more examples a step.",
        stacklevel=2,
    )


def _loss_at(module: MergeModule, data: Calibration, values: Tensor) -> float:
    module.coefficients.reset_(values)
    return calibration_loss(module, data)


def warn_if_it_never_fell(folder: RunFolder) -> None:
    """Say so when no step had a lower loss than the first one."""
    if not folder.metrics.exists():
        return  # stopped before a step
    losses = [
        row["loss"] for line in folder.metrics.read_text().splitlines() if "loss" in (row := json.loads(line))
    ]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) > ENOUGH and min(finite[1:]) >= finite[0]:
        warnings.warn(
            f"no step had a lower loss than the first ({finite[0]:.4f}): lower the learning rate, or take "
            "the starting coefficients as they are",
            stacklevel=2,
        )
