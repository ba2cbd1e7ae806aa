"""Padding of tokenised texts, and the positions that enter the loss.

Legend: `B` examples, `T` tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainmerge.data.encoded import Encoded
from trainmerge.system.plain_data import text_settings

WHOLE = ("siglip", "siglip2")  # their text towers read the last of a fixed number of tokens, padding or not


def whole_length(config: Mapping[str, Any]) -> int | None:
    """The number of tokens to which every text is padded, if the model of this config.json needs one."""
    length = text_settings(config).get("max_position_embeddings", 64)
    return int(length) if config.get("model_type") in WHOLE else None


def in_one_batch(
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


def fillers(tokenizer: Any) -> dict[str, int]:
    """The padding of each input of a transformers tokenizer that is not padded with 0."""
    padding = int(tokenizer.pad_token_id)
    return {"input_ids": padding, "labels": padding, "token_type_ids": tokenizer.pad_token_type_id}


def batched(rows: Sequence[Encoded], fillers: Mapping[str, int]) -> Encoded:
    """Examples that were encoded one by one, in one batch: padded on the right, as encoded together."""
    inputs = {key: _stacked([row.inputs[key] for row in rows], fillers.get(key, 0)) for key in rows[0].inputs}
    return Encoded(inputs, _stacked([row.mask for row in rows], 0))


def _stacked(rows: Sequence[Tensor], filler: int) -> Tensor:
    """[1, T, ...] each -> [B, T, ...]."""
    first, longest = rows[0], max(row.shape[1] for row in rows)
    whole = first.new_full((len(rows), longest, *first.shape[2:]), filler)
    for i, row in enumerate(rows):
        whole[i, : row.shape[1]] = row[0]
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
