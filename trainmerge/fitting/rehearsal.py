"""The first step of optimizer, schedule and rule on copies, before a fit makes its folder.

Legend: `K` experts, `G` coefficient groups.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainmerge.coefficients.aggregation import aggregate_gradients
from trainmerge.system.memory import is_out_of_memory
from trainmerge.system.text import reason


def rehearse_steps(optimizer: Optimizer, scheduler: LRScheduler | None, prefix: str = "model.") -> None:
    """One step of both; they and the optimizer's values are copies that nobody uses afterwards.

    `prefix` begins the settings' names in errors.

    Raises:
        ValueError: one of them cannot step; names its class and the reason.
    """
    values: list[Tensor] = [value for group in optimizer.param_groups for value in group["params"]]

    def closure() -> Any:  # a tensor, as from a real step; typed as a float in torch
        for value in values:
            value.grad = torch.ones_like(value)
        return torch.ones((), device=values[0].device)

    closure()
    with naming_key(f"{prefix}optimizer", type(optimizer)), torch.random.fork_rng(devices=[]):
        optimizer.step(closure)
    if scheduler is not None:
        with naming_key(f"{prefix}lr_scheduler", type(scheduler)):
            scheduler.step()


def rehearse_rule(rule: torch.nn.Module, like: Tensor, prefix: str = "model.") -> None:
    """A copy of the rule on one random gradient per expert, each like the coefficients [K, G].

    Raises:
        ValueError: it does not map [m, n] to [n]; names its class and the reason.
    """
    try:
        copied = deepcopy(rule)
    except Exception:  # it has state of its own kind, which the fit's first step must find as it is
        return
    tensors = [*rule.parameters(), *rule.buffers()]
    device = tensors[0].device if tensors else like.device
    rows = torch.randn((len(like), *like.shape), generator=torch.Generator().manual_seed(0)).to(device)
    with naming_key(f"{prefix}combine", type(rule)):
        aggregate_gradients(rows, copied, seed=0)


@contextmanager
def naming_key(key: str, make: Callable[..., Any]) -> Iterator[None]:
    """Name the key and the class in what a class of the user's raises; a full memory stays one.

    Raises:
        ValueError: it raised anything else.
    """
    try:
        yield
    except Exception as error:  # of any type: it is the user's own code
        if is_out_of_memory(error):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{key}: {_name(make)} does not work: {kind}{reason(error)}") from error


def _name(make: Callable[..., Any]) -> str:
    """The class that a callable makes, if it tells: a configuration's is a partial with the class in it."""
    inside = [*getattr(make, "args", ()), getattr(make, "func", make)]
    kind = next((item for item in inside if isinstance(item, type)), inside[-1])
    return str(getattr(kind, "__name__", kind))
