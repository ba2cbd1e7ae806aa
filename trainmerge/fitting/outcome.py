"""The first process after a fit: save the coefficients, and warn of a fit that did not help."""

import math
import warnings

import torch

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.begin import Snapshot
from trainmerge.fitting.model_settings import needs_examples
from trainmerge.fitting.module import MergeModule
from trainmerge.run.folder import RunFolder
from trainmerge.run.saved import save_moment
from trainmerge.system.json_file import read_json_lines

MOVED = 1e-4  # change of a coefficient, below which nothing was learned
AT_BOUND = 0.25  # share of coefficients at a bound
ENOUGH = 5  # later steps needed before losses are compared, because batches differ


def save_start(folder: RunFolder, module: MergeModule, data: Calibration, following: int = 0) -> None:
    """Save a run without steps: its coefficients are the starting ones, before `following` evaluations."""
    if needs_examples(module.recipe, module.initial):
        module.load(data)
    save_moment(folder, module.coefficients, step=0, steps=following)


def save_end(folder: RunFolder, module: MergeModule, snapshot: Snapshot) -> None:
    """Save a run that has all its steps already: its coefficients are those of the last step."""
    with torch.no_grad():
        module.coefficients.raw.copy_(snapshot.content["state_dict"]["coefficients.raw"])
    save_moment(folder, module.coefficients, snapshot.step, steps=snapshot.step)
    print(f"{folder.path}: finished at step {snapshot.step}; raise trainer.max_steps to continue")


def check_learned(folder: RunFolder, module: MergeModule) -> None:
    """Warn if a fit changed nothing, did not lower the loss, or ended at its bounds.

    Raises:
        ValueError: no step was made.
    """
    if not folder.coefficients.exists():
        raise ValueError("no step was made: raise trainer.max_time")
    warn_if_unchanged(module)
    warn_if_at_bound(module)


def warn_if_unchanged(module: MergeModule) -> None:
    """Warn if no coefficient changed: nothing was learned."""
    moved = (module.coefficients().detach().cpu() - module.start).abs().max().item()
    if moved < MOVED:
        warnings.warn(
            f"the coefficients changed by at most {moved:.1e}: raise the learning rate or trainer.max_steps",
            stacklevel=2,
        )


def warn_if_at_bound(module: MergeModule) -> None:
    """Warn if many coefficients are at a bound of the constraint."""
    coefficients = module.coefficients
    fixed = {*coefficients.layout.fixed}
    learned = [group for group in range(coefficients.raw.shape[1]) if group not in fixed]
    with torch.no_grad():
        share = coefficients.constraint.at_bound(coefficients())[:, learned].float().mean().item()
    if share >= AT_BOUND:
        warnings.warn(
            f"{100 * share:.0f}% of the coefficients are at a bound of {coefficients.constraint}: widen it, "
            "lower the learning rate, or remove the constraint",
            stacklevel=2,
        )


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
