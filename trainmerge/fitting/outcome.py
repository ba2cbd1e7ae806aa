"""The first process after a fit: save the coefficients, and warn of a fit that did not help."""

import math
import warnings

import pytorch_lightning as pl
import torch

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.begin import Snapshot
from trainmerge.fitting.held_out_stopping import StopOnHeldOut
from trainmerge.fitting.learned import warn_if_at_bound, warn_if_unchanged, warn_if_unreached
from trainmerge.fitting.model_settings import needs_examples
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.written_record import keep_generated
from trainmerge.run.folder import RunFolder
from trainmerge.run.saved import save_moment
from trainmerge.system.json_file import read_json_lines

ENOUGH = 5  # later steps needed before losses are compared, because batches differ


def save_start(folder: RunFolder, module: MergeModule, data: Calibration, following: int = 0) -> None:
    """Save a run without steps: its coefficients are the starting ones, before `following` evaluations."""
    if needs_examples(module.recipe, module.initial):
        module.load(data)
        keep_generated(folder, module, data)
    save_moment(folder, module.coefficients, step=0, steps=following)


def save_end(folder: RunFolder, module: MergeModule, snapshot: Snapshot) -> None:
    """Save a run that has all its steps already: its coefficients are those of the last step."""
    with torch.no_grad():
        module.coefficients.raw.copy_(snapshot.content["state_dict"]["coefficients.raw"])
    save_moment(folder, module.coefficients, snapshot.step, steps=snapshot.step)
    print(f"{folder.path}: finished at step {snapshot.step}; raise trainer.max_steps to continue")


def save_best(folder: RunFolder, module: MergeModule, trainer: pl.Trainer, snapshot: Snapshot | None) -> None:
    """With `StopOnHeldOut`, make the best step's coefficients the run's."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if not isinstance(callback, StopOnHeldOut):
            continue
        states = snapshot.content["callbacks"] if snapshot else {}
        if callback.best is None and callback.state_key in states:  # no step was left to make
            callback.load_state_dict(states[callback.state_key])
        if callback.best is not None:
            step, values = callback.best
            module.coefficients.reset_(values)
            save_moment(folder, module.coefficients, step, steps=step)


def check_learned(folder: RunFolder, module: MergeModule) -> None:
    """Warn if a fit changed nothing, did not lower the loss, or ended at its bounds.

    Raises:
        ValueError: no step was made.
    """
    if not folder.coefficients.exists():
        raise ValueError("no step was made: raise trainer.max_time")
    warn_if_unchanged(module.coefficients, module.start, "trainer.max_steps")
    warn_if_at_bound(module.coefficients)
    warn_if_unreached(module.resident.merged)


def warn_if_loss_did_not_fall(folder: RunFolder) -> None:
    """Warn if no step had a lower loss than the first one."""
    if not folder.metrics.exists():
        return  # stopped before a step
    losses = [row["loss"] for row in read_json_lines(folder.metrics) if "loss" in row]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) > ENOUGH and min(finite[1:]) >= finite[0]:
        warnings.warn(
            f"no step had a lower loss than the first ({finite[0]:.4f}): lower the learning rate, or use the "
            "starting coefficients",
            stacklevel=2,
        )
