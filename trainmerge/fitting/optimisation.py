"""A fit's optimizer and learning-rate schedule, built on a copy of the coefficients to look at them."""

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainmerge.fitting.module import MergeModule
from trainmerge.system.ranges import FINITE, fault


def build_optimizer(module: MergeModule) -> Optimizer:
    """The optimizer over a copy of the coefficients."""
    return module.make_optimizer(iter([torch.nn.Parameter(module.coefficients.raw.detach().clone())]))


def check_optimisation(module: MergeModule) -> None:
    """Raise ValueError for settings under which a fit could not take its steps."""
    optimizer = build_optimizer(module)
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key != "params" and (problem := fault(value, object, FINITE)):
                raise ValueError(f"model.optimizer.{key} must be {problem}")
    scheduler: Any = module.make_scheduler(optimizer) if module.make_scheduler else None
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "model.lr_scheduler: ReduceLROnPlateau waits for a measure at the end of an epoch, and a fit has "
            "none. Use a schedule over steps, such as torch.optim.lr_scheduler.CosineAnnealingLR; "
            "trainmerge.StopWhenFlat ends a fit whose loss no longer falls"
        )
    if scheduler is not None and not isinstance(scheduler, LRScheduler):
        raise ValueError(
            f"model.lr_scheduler: {type(scheduler).__name__} is no torch.optim.lr_scheduler.LRScheduler, so "
            "it would never be stepped"
        )
