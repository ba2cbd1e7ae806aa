"""Warn of coefficients that a fit did not move, or that are at a bound.

Legend: `K` experts, `G` coefficient groups.
"""

import warnings

import torch
from torch import Tensor

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.model.merged_model import MergedModel
from trainmerge.system import distributed
from trainmerge.system.text import listed

MOVED = 1e-4  # change of a coefficient, below which nothing was learned
AT_BOUND = 0.25  # share of coefficients at a bound


def warn_if_unchanged(coefficients: Coefficients, start: Tensor, steps: str) -> None:
    """Warn if no coefficient [K, G] moved from `start`; `steps` is the name of that setting."""
    moved = (coefficients().detach().cpu() - start.cpu()).abs().max().item()
    if moved < MOVED:
        warnings.warn(
            f"the coefficients changed by at most {moved:.1e}: raise the learning rate or {steps}",
            stacklevel=2,
        )


def warn_if_at_bound(coefficients: Coefficients) -> None:
    """Warn if many coefficients are at a bound of the constraint."""
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


def share_reached(merged: MergedModel) -> None:
    """Let every process know the experts of a mixture that any process's tokens reached, or its shard has."""
    if merged.placed.parts(merged.coefficients.layout.learned):
        merged.reached.update(*distributed.all_gather(merged.reached))


def warn_if_unreached(merged: MergedModel) -> None:
    """Warn of experts of a mixture that no calibration token reached; after `share_reached`."""
    layout = merged.coefficients.layout
    learned = merged.placed.parts(layout.learned)
    lost = [name for name in learned if name not in merged.reached]
    if not lost or not merged.reached:
        return
    reached = {group for name in merged.reached for group in layout.groups[name]}
    alone = sum(reached.isdisjoint(layout.groups[name]) for name in lost)
    warnings.warn(
        f"{len(lost)} of {len(learned)} matrices of experts were reached by no calibration token "
        f"({listed(lost, 3)}): {alone} keep their starting coefficient, {len(lost) - alone} have the "
        "one that their layer's other experts learned. More examples reach more experts",
        stacklevel=2,
    )
