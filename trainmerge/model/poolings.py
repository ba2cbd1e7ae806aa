"""Poolings of sentence-transformers: a text's hidden states to one vector.

Legend: `B` examples, `T` tokens, `D` hidden size.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainmerge.data.classifier import pool
from trainmerge.system.text import shortened

KEY = "pooling_mode_"
Pooled = Callable[[Tensor, Tensor], Tensor]  # hidden states [B, T, D], mask [B, T] -> [B, D]


def _largest(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _root_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].float()
    return ((hidden * weights).sum(dim=1) / weights.sum(dim=1).sqrt()).to(hidden.dtype)


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device))[..., None].float()
    return ((hidden * weights).sum(dim=1) / weights.sum(dim=1)).to(hidden.dtype)


# By sentence-transformers' keys `pooling_mode_*`, in the order in which it concatenates them
POOLINGS: dict[str, Pooled] = {
    "cls_token": lambda hidden, mask: pool(hidden, mask, "first"),
    "max_tokens": _largest,
    "mean_tokens": lambda hidden, mask: pool(hidden, mask, "mean"),
    "mean_sqrt_len_tokens": _root_mean,
    "weightedmean_tokens": _weighted_mean,
    "lasttoken": _last,
}
SHORT = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "weightedmean": "weightedmean_tokens",
}


def poolings_of(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The poolings that a configuration names, in the order in which their vectors are concatenated.

    That of `pooling_mode`, as it lists them; else by the older keys `pooling_mode_*`, in the order above.

    Raises:
        ValueError: none, or one that is not supported.
    """
    given = config.get("pooling_mode")
    if given is None:
        on = {key.removeprefix(KEY) for key, value in config.items() if key.startswith(KEY) and value is True}
        chosen = [*(name for name in POOLINGS if name in on), *sorted(on - POOLINGS.keys())]
    else:
        chosen = [SHORT.get(str(name), str(name)) for name in (given if isinstance(given, list) else [given])]
    strange = [name for name in chosen if name not in POOLINGS]
    if strange or not chosen:
        named = shortened(", ".join(strange), 300) or "of no kind"
        raise ValueError(f"{path}: poolings {named}; supported are {', '.join(POOLINGS)}")
    return tuple(chosen)
