"""Copies of tensors in few large buffers, where each buffer's size is rounded up to a power of two.

torch's pinned allocator rounds so. One buffer per tensor would take up to twice the tensors' bytes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LINE = 64  # bytes of a cache line, and of the widest vector registers
PARTS = 64  # the buffers together exceed what they are made for by a part at most


class Slabs:
    """Buffers for tensors of about `total` bytes: the powers of two that add up to it, the largest first.

    Args:
        total: Bytes of the tensors that will be copied.
        allocate: Makes a buffer of so many bytes, uint8.
    """

    def __init__(self, total: int, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._coming = powers(total)
        self._open: list[Tensor] = []  # what is left of each buffer

    def copy(self, part: Tensor) -> Tensor:
        """A copy of the same shape and strides that begins as many bytes after a cache line."""
        fitting = (i for i, left in enumerate(self._open) if _first(left, part) + part.nbytes <= len(left))
        place = next(fitting, len(self._open))
        if place == len(self._open):
            self._open.append(self._allocate(self._next(part.nbytes + LINE)))
        left = self._open[place]
        self._open[place] = left[_first(left, part) + part.nbytes :]
        return copy_into(left, part)

    def _next(self, size: int) -> int:
        """The size of the next buffer, which has room for so many bytes."""
        fitting = [count for count in self._coming if count >= size]
        if not fitting:
            return 1 << (size - 1).bit_length()
        self._coming.remove(fitting[0])
        return fitting[0]


def powers(total: int) -> list[int]:
    """Powers of two, the largest first, whose sum is `total` or more by less than `total` / `PARTS`.

    >>> powers(7), powers(1000), powers(1025)
    ([4, 2, 1], [512, 256, 128, 64, 32, 8], [1024, 16])
    """
    part = 1 << max(0, (total // PARTS).bit_length() - 1)
    rounded = -(-total // part) * part
    return [1 << bit for bit in reversed(range(rounded.bit_length())) if rounded >> bit & 1]


def copy_into(memory: Tensor, part: Tensor) -> Tensor:
    """A copy in `memory`, uint8 with room for it; products may depend on where in a line it begins."""
    first = _first(memory, part)
    flat = memory[first : first + part.nbytes].view(part.dtype)
    return flat.as_strided(part.shape, torch.empty_like(part, device="meta").stride()).copy_(part)


def _first(memory: Tensor, part: Tensor) -> int:
    """The first byte of `memory` as far from the begin of a cache line as `part` is."""
    return (part.data_ptr() - memory.data_ptr()) % LINE
