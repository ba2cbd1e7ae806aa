"""The largest of many numbers that are never held at once: exact, with no sort and no copy.

Numbers are non-negative float32; the integers that their bits are have the same order, so two passes that
count the upper and the lower 16 bits find the k-th largest.

Legend: `K` rows, each with its own order; `n` numbers of one piece.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainmerge.kernels import Term
from trainmerge.task_vectors import dense_term

Pieces = Callable[[], Iterable[Tensor]]  # every call goes through all of them: [K, n] each
UPPER, LOWER = 1 << 15, 1 << 16  # values of the upper bits of a non-negative float32, and of the lower


class Limit(NamedTuple):
    """What of one piece passes: entries above a magnitude, and the first few that equal it."""

    bits: int  # the magnitude, as a float32's bits
    admitted: int | None  # how many of those that equal it, in order; None for all

    def trim_(self, tau: Tensor) -> Tensor:
        """Set all else of `tau` to zero, in place."""
        level = _float(self.bits)
        if self.admitted != 0:
            level = float(np.nextafter(np.float32(level), np.float32(-1)))
        narrow = tau.float()
        kept = torch.hardshrink(narrow, level, out=narrow)
        if self.admitted:
            equal = (magnitude_bits(kept) == self.bits).flatten()
            kept.masked_fill_((equal & (equal.cumsum(0) > self.admitted)).view(tau.shape), 0.0)
        return tau if kept is tau else tau.mul_(kept != 0)


class Cut:
    """Keeps the entries above a magnitude, and the first `ties` of those that equal it. In order."""

    def __init__(self, bits: int, ties: int) -> None:
        self.bits, self.ties = bits, ties

    def limit(self, tau: Tensor) -> Limit:
        """What passes of `tau`, the piece that comes next."""
        equal = np.count_nonzero(_bits(tau) == self.bits) if self.ties else 0
        admitted = min(self.ties, equal)
        self.ties -= admitted
        return Limit(self.bits, None if 0 < equal == admitted else admitted)

    def __call__(self, tau: Tensor) -> Tensor:
        """`tau` with everything below the cut set to zero."""
        return self.limit(tau).trim_(tau.clone())

    @property
    def value(self) -> float:
        """The magnitude itself."""
        return _float(self.bits)


def cut_at(entries: Sequence[tuple[Term, Tensor]], density: float) -> Cut:
    """The cut that keeps floor(density x size) entries, at least one, over all `entries` (term, base)."""
    size = sum(base.numel() for _, base in entries)
    (cut,) = cuts(lambda: (dense_term(*entry).view(1, -1) for entry in entries), count(size, density))
    return cut


def count(size: int, share: float) -> int:
    """Floor(share x size), at least one.

    >>> count(100, 0.29)  # 0.29 * 100 is 28.999...
    29
    """
    return max(1, int(share * size + 1e-6))


def cuts(pieces: Pieces, wanted: int) -> list[Cut]:
    """K cuts, each keeping the `wanted` largest magnitudes of its row."""
    high = [_bucket(counts, wanted) for counts in _histograms(pieces, UPPER, lambda bits, _: bits >> 16)]
    inside = _histograms(pieces, LOWER, lambda bits, k: _within(bits, high[k][0] << 16))
    low = [_bucket(counts, wanted - above) for counts, (_, above) in zip(inside, high, strict=True)]
    return [
        Cut((upper << 16) | lower, wanted - above - above_low)
        for (upper, above), (lower, above_low) in zip(high, low, strict=True)
    ]


def _within(bits: NDArray[np.int32], first: int) -> NDArray[np.int32]:
    """Of the numbers in [first, first + 2^16) by how much they are above `first`."""
    above = np.subtract(bits, first, out=bits).view(np.uint32)
    return above[above < LOWER].view(np.int32)


def _histograms(
    pieces: Pieces, size: int, digits: Callable[[NDArray[np.int32], int], NDArray[np.int32]]
) -> list[Tensor]:
    """One histogram a row."""
    counts: list[Tensor] = []
    for piece in pieces():
        counts = counts or [torch.zeros(size, dtype=torch.int64) for _ in piece]
        for k, row in enumerate(piece):
            counts[k] += torch.bincount(torch.from_numpy(digits(_bits(row), k)), minlength=size)
    return counts


def _bucket(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bucket that holds the `wanted`-th largest entry, and how many entries lie above it."""
    from_top = counts.flip(0).cumsum(0)
    index = int((from_top < wanted).sum())
    return len(counts) - 1 - index, int(from_top[index - 1]) if index else 0


def magnitude_bits(tau: Tensor) -> Tensor:
    """|tau| as float32, its bits read as int32: monotone in the magnitude."""
    return tau.float().abs().view(torch.int32)


def _bits(tau: Tensor) -> NDArray[np.int32]:
    """The same as a new array, which numpy filters faster than torch does."""
    bits: NDArray[np.int32] = magnitude_bits(tau).numpy()
    return bits


def _float(bits: int) -> float:
    return float(np.int32(bits).view(np.float32))
