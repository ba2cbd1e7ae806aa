"""A fit's optimizer and learning-rate schedule, built on a copy of the coefficients to look at them."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.concrete_rows import ConcreteRows
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.rehearsal import naming_key, rehearse_rule, rehearse_steps
from trainmerge.system.ranges import FINITE, fault


class Optimisation(NamedTuple):
    """The optimizer, its settings before a schedule changes them, and the schedule if there is one."""

    optimizer: Optimizer
    settings: str
    scheduler: Any = None


def build_optimisation(module: MergeModule, device: torch.device | str = "cpu") -> Optimisation:
    """Both, over a copy of the coefficients.

    Raises:
        ValueError: one of them cannot be made; names its class and the reason.
    """
    return optimisation_of(
        module.coefficients, module.make_optimizer, module.make_scheduler, "model.", device
    )


def optimisation_of(
    coefficients: Coefficients,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    make_scheduler: Callable[[Optimizer], Any] | None,
    prefix: str = "",
    device: torch.device | str = "cpu",
) -> Optimisation:
    """`build_optimisation` from the parts of a fit; `prefix` begins the settings' names in errors."""
    copied = nn.Parameter(coefficients.raw.detach().clone().to(device))
    with naming_key(f"{prefix}optimizer", make_optimizer):
        optimizer = make_optimizer(iter([copied]))
        ConcreteRows.follow(optimizer, coefficients)
    settings, scheduler = str(optimizer), None
    if make_scheduler:
        with naming_key(f"{prefix}lr_scheduler", make_scheduler):
            scheduler = make_scheduler(optimizer)
    return Optimisation(optimizer, settings, scheduler)


def check_optimisation(module: MergeModule, device: torch.device | str = "cpu") -> None:
    """Raise ValueError for settings under which a fit could not take its steps on this device."""
    check_steps(build_optimisation(module, device), "model.")
    if module.rule is not None:
        rehearse_rule(module.rule, module.coefficients.raw.detach())


def check_steps(optimisation: Optimisation, prefix: str = "") -> None:
    """Raise ValueError for an optimizer or a schedule that cannot take steps; their values are not kept."""
    optimizer, _, scheduler = optimisation
    for group in optimizer.param_groups:
        for key, value in group.items():
            interval = FINITE if key == "lr" else "[-inf, inf]"  # other bounds may be infinite, but not NaN
            number = isinstance(value, int | float | Tensor)
            if number and (problem := fault(value, object, interval)):
                raise ValueError(f"{prefix}optimizer.{key} must be {problem}")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            f"{prefix}lr_scheduler: ReduceLROnPlateau waits for a measure at the end of an epoch, and a fit "
            "has none. Use a schedule over steps, such as torch.optim.lr_scheduler.CosineAnnealingLR"
            + ("; trainmerge.StopWhenFlat ends a fit whose loss no longer falls" if prefix else "")
        )
    if scheduler is not None and not isinstance(scheduler, LRScheduler):
        raise ValueError(
            f"{prefix}lr_scheduler: {type(scheduler).__name__} is no torch.optim.lr_scheduler.LRScheduler, "
            "so it would never be stepped"
        )
    rehearse_steps(optimizer, scheduler, prefix)
