"""Buffers by rule: they are never merged, but kept, averaged, or estimated again.

Legend: `K` experts, `*S` shape of a buffer.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from trainmerge.system.text import listed
from trainmerge.task_vectors.state_dicts import STATISTICS, StateDict

BufferRule = Literal["keep", "average", "reestimate"]


def check_rule(rule: BufferRule | None, names: Iterable[str], where: Path) -> None:
    """Raise ValueError for a recipe's rule of statistics that a base with these tensors does not have."""
    if rule not in (None, "keep") and not any(map(STATISTICS.search, names)):
        raise ValueError(
            f"recipe.buffers is {rule}, and {where} has no batch norm with running statistics: "
            "leave the key out"
        )


def average_buffers(
    base: StateDict, experts: Sequence[StateDict], names: Sequence[str], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Each floating-point buffer's weighted mean over K experts [*S], summed in float64 and rounded once.

    Buffers that are equal everywhere keep their bits; integers (`num_batches_tracked`) are the base's.
    """
    total = sum(weights)
    found = {}
    for name in names:
        own = [state[name].detach().cpu() for state in experts]
        if not base[name].is_floating_point() or all(torch.equal(tensor, own[0]) for tensor in own):
            found[name] = (own[0] if base[name].is_floating_point() else base[name].detach()).clone()
            continue
        parts = [weight / total * tensor.double() for weight, tensor in zip(weights, own, strict=True)]
        found[name] = torch.stack(parts).sum(dim=0).to(base[name].dtype)
    return found


def warn_of_own_buffers(base: StateDict, experts: Mapping[str, StateDict], names: Sequence[str]) -> None:
    """Warn of buffers that an expert changed, and that keep the base's values."""
    changed = [
        name
        for name in names
        if base[name].is_floating_point()
        and any(not torch.equal(own[name].cpu(), base[name].detach().cpu()) for own in experts.values())
    ]
    if changed:
        warnings.warn(
            f"experts have buffers of their own, {listed(changed)}, and the merge keeps the base's. "
            "buffers='average' averages them, buffers='reestimate' estimates batch norms' statistics again "
            "on calibration data, and buffers='keep' is this, without a warning",
            stacklevel=4,
        )


@contextmanager
def holding(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """In this context the module's buffers have these values, where there is one."""
    own = {name: buffer for name, buffer in module.named_buffers() if name in values}
    before = {name: buffer.clone() for name, buffer in own.items()}
    try:
        for name, buffer in own.items():
            buffer.copy_(values[name])
        yield
    finally:
        for name, buffer in own.items():
            buffer.copy_(before[name])
