"""A fit's optimizer and learning-rate schedule, built on a copy of the coefficients to look at them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainmerge.fitting.module import MergeModule
from trainmerge.system.ranges import FINITE, fault


class Optimisation(NamedTuple):
    """The optimizer, its settings before a schedule changes them, and the schedule if there is one."""

    optimizer: Optimizer
    settings: str
    scheduler: Any = None


def build_optimisation(module: MergeModule) -> Optimisation:
    """Both, over a copy of the coefficients."""
    optimizer = module.make_optimizer(iter([torch.nn.Parameter(module.coefficients.raw.detach().clone())]))
    settings = str(optimizer)
    scheduler = module.make_scheduler(optimizer) if module.make_scheduler else None
    return Optimisation(optimizer, settings, scheduler)


def check_optimisation(module: MergeModule) -> None:
    """Raise ValueError for settings under which a fit could not take its steps."""
    optimizer, _, scheduler = build_optimisation(module)
    for group in optimizer.param_groups:
        for key, value in group.items():
            interval = FINITE if key == "lr" else "[-inf, inf]"  # other bounds may be infinite, but not NaN
            number = isinstance(value, int | float | Tensor)
            if number and (problem := fault(value, object, interval)):
                raise ValueError(f"model.optimizer.{key} must be {problem}")
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
