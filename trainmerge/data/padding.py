"""Padding of tokenised texts, and the positions that enter the loss.

Legend: `B` examples, `T` tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainmerge.system.plain_data import text_settings

WHOLE = ("siglip", "siglip2")  # their text towers read the last of a fixed number of tokens, padding or not


def whole_length(config: Mapping[str, Any]) -> int | None:
    """The number of tokens to which every text is padded, if the model of this config.json needs one."""
    length = text_settings(config).get("max_position_embeddings", 64)
    return int(length) if config.get("model_type") in WHOLE else None


def joined(
    parts: Sequence[tuple[dict[str, Tensor], list[int]]], fillers: Mapping[str, int]
) -> dict[str, Tensor]:
    """Batches and the rows that they become, in one batch: padded on the right."""
    count, longest = sum(len(rows) for _, rows in parts), max(p["input_ids"].shape[1] for p, _ in parts)
    whole = {
        key: first.new_full((count, longest, *first.shape[2:]), fillers.get(key, 0))
        for key, first in parts[0][0].items()
    }
    for part, rows in parts:
        for key, tensor in part.items():
            whole[key][torch.tensor(rows), : tensor.shape[1]] = tensor
    return whole


def answers(offsets: Tensor, spans: tuple[tuple[int, int], ...] | None, real: Tensor) -> Tensor:
    """Positions [T] whose next token overlaps a span; all unpadded ones without spans."""
    if spans is None:
        return real
    begins, ends = offsets.unbind(-1)
    inside = torch.zeros_like(real)
    for begin, end in spans:
        inside |= (begins < end) & (ends > begin) & real
    return torch.cat([inside[1:], inside.new_zeros(1)])
