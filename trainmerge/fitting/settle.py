"""`recipe.buffers: reestimate`: the statistics of batch norms at the start of a fit, and of its result."""

import torch

from trainmerge.coefficients.coefficients import load_coefficients
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.module import MergeModule
from trainmerge.model.statistics import statistics_at
from trainmerge.run.folder import RunFolder
from trainmerge.run.merge_buffers import REESTIMATE, are_current, save_statistics


@torch.no_grad()
def settle(folder: RunFolder, module: MergeModule, data: Calibration) -> None:
    """Measure the statistics of the run's merge and save them in its folder, unless they are there."""
    if module.recipe.buffers != REESTIMATE:
        return
    coefficients = load_coefficients(folder.coefficients)
    if are_current(folder, coefficients):
        return
    module.load(data)
    found = statistics_at(module.resident, coefficients().detach(), data)
    save_statistics(folder, coefficients, found)
