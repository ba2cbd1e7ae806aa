"""Fits of a world with an optimizer of ours."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

import trainmerge as tm
from trainmerge.run.recipe_files import calibration_files


def fitted(merge: tm.Recipe, run: Path, optimizer: Callable[..., Optimizer], *steps: int) -> Tensor:
    """The coefficients after a fit that is resumed up to each of these steps."""
    for last in steps:
        module = tm.MergeModule(merge, initial=0.5, optimizer=optimizer, workspace=str(run / "workspace"))
        data = tm.Calibration(calibration_files(merge), merge.base, batch_size=4, max_length=16)
        trainer = tm.make_trainer(run, max_steps=last, accelerator="cpu", enable_progress_bar=False)
        tm.fit(module, data, trainer, run)
    return module.coefficients().detach()
