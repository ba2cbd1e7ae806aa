"""Masks as bits, eight a byte, and the numbers -1, 0, 1 five a byte: 1 and 1.6 bits each.

The first entry is in the lowest bit or digit. The last byte is filled up with zeros, so the number of entries
is stored elsewhere.
"""

import numpy as np
import torch
from torch import Tensor

TRITS = 5  # digits of base 3 in a byte: 3^5 = 243
ALIGNED = 8 * TRITS  # entries after which both forms begin a new byte
_POWERS = torch.tensor([1, 3, 9, 27, 81])


def pack_bits(mask: Tensor) -> Tensor:
    """Booleans of any shape -> uint8 [ceil(n / 8)].

    >>> pack_bits(torch.tensor([True, False, True]))
    tensor([5], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, first: int, count: int) -> Tensor:
    """Undo `pack_bits` for `count` entries from `first` on, a multiple of 8 -> bool [count]."""
    assert first % 8 == 0
    some = packed[first // 8 : -(-(first + count) // 8)]
    return torch.from_numpy(np.unpackbits(some.numpy(), count=count, bitorder="little")).bool()


def pack_trits(signs: Tensor) -> Tensor:
    """Numbers -1, 0, 1 of any shape -> uint8 [ceil(n / 5)].

    >>> pack_trits(torch.tensor([-1, 0, 1, 1, -1, 0]))
    tensor([ 75, 121], dtype=torch.uint8)
    """
    flat = signs.reshape(-1).to(torch.int16)
    digits = torch.nn.functional.pad(flat, (0, -len(flat) % TRITS)) + 1
    return (digits.view(-1, TRITS) * _POWERS.to(torch.int16)).sum(dim=1).to(torch.uint8)


def unpack_trits(packed: Tensor, first: int, count: int) -> Tensor:
    """Undo `pack_trits` for `count` entries from `first` on, a multiple of 5 -> int8 [count]."""
    assert first % TRITS == 0
    some = packed[first // TRITS : -(-(first + count) // TRITS)].to(torch.int16)
    digits = some[:, None] // _POWERS.to(torch.int16) % 3 - 1
    return digits.view(-1)[:count].to(torch.int8)
