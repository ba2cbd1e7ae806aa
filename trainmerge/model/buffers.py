"""Buffers by rule: they are never merged, but kept, averaged, or estimated again.

Legend: `K` experts, `*S` shape of a buffer.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from trainmerge.system.text import listed
from trainmerge.task_vectors.state_dicts import StateDict

BufferRule = Literal["keep", "average", "reestimate"]


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
