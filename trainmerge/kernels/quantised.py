"""A task vector in one byte or two bits per weight: tau = codes x scale.

Legend: `R` rows, `W` elements of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PER_BYTE = 4  # codes of two bits


class Quantised(NamedTuple):
    """A task vector of integers and scales: tau[r] = `scale`[r] * code[r].

    `codes` are int8, one per weight; or uint8, four weights -1, 0, 1 per byte (`pack_codes`).
    """

    codes: Tensor  # [rows, W] int8, or [rows, ceil(W / 4)] uint8
    scale: Tensor  # [rows] float32, or [1]: one for all


def dequantise(term: Quantised, rows: slice, out: Tensor) -> Tensor:
    """Write tau[rows] into `out` [R, W], in its dtype and on its device."""
    codes = term.codes[rows].to(out.device)
    out.copy_(codes.flatten(1) if codes.dtype == torch.int8 else unpack_codes(codes, out.shape[1]))
    scale = term.scale if len(term.scale) == 1 else term.scale[rows]
    return out.mul_(scale.to(out)[:, None])


def pack_codes(signs: Tensor) -> Tensor:
    """Numbers -1, 0, 1 [R, W] int8 -> [R, ceil(W / 4)] uint8."""
    padded = torch.nn.functional.pad(signs + 1, (0, -signs.shape[1] % PER_BYTE)).to(torch.uint8)
    fours = padded.view(len(signs), -1, PER_BYTE)
    return fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6


def unpack_codes(packed: Tensor, width: int) -> Tensor:
    """Undo `pack_codes`, [R, ceil(W / 4)] uint8 -> [R, W] int8."""
    fours = torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return fours.view(len(packed), -1)[:, :width].to(torch.int8) - 1
