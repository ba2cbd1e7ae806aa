"""The largest of many numbers that are never held at once: exact, with no sort and no copy.

Numbers are non-negative float32; the integers that their bits are have the same order, so two passes that
count the upper and the lower 16 bits find the k-th largest.

Legend: `K` rows, each with its own order; `n` numbers of one piece.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from trainmerge.kernels import Term
from trainmerge.task_vectors import dense_term

Pieces = Callable[[], Iterable[Tensor]]  # every call goes through all of them: [K, n] each


class Cut:
    """Keeps the entries above a magnitude, and the first `ties` of those that equal it. In order."""

    def __init__(self, bits: int, ties: int) -> None:
        self.bits, self.ties = bits, ties

    def __call__(self, tau: Tensor) -> Tensor:
        """`tau` with everything below the cut set to zero."""
        bits = magnitude_bits(tau)
        equal = (bits == self.bits).flatten()
        admitted = equal & (equal.cumsum(0) <= self.ties)
        self.ties -= int(admitted.sum())
        return tau * ((bits > self.bits) | admitted.view(tau.shape))

    @property
    def value(self) -> float:
        """The magnitude itself."""
        return torch.tensor(self.bits, dtype=torch.int32).view(torch.float32).item()


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
    high = [_bucket(counts, wanted) for counts in _histograms(pieces, lambda bits, _: bits >> 16)]
    inside = _histograms(pieces, lambda bits, k: bits[bits >> 16 == high[k][0]] & 0xFFFF)
    low = [_bucket(counts, wanted - above) for counts, (_, above) in zip(inside, high, strict=True)]
    return [
        Cut((upper << 16) | lower, wanted - above - above_low)
        for (upper, above), (lower, above_low) in zip(high, low, strict=True)
    ]


def _histograms(pieces: Pieces, digits: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
    """One histogram a row."""
    counts: list[Tensor] = []
    for piece in pieces():
        counts = counts or [torch.zeros(1 << 16, dtype=torch.int64) for _ in piece]
        for k, row in enumerate(piece):
            counts[k] += torch.bincount(digits(magnitude_bits(row), k), minlength=1 << 16)
    return counts


def _bucket(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bucket that holds the `wanted`-th largest entry, and how many entries lie above it."""
    from_top = counts.flip(0).cumsum(0)
    index = int((from_top < wanted).sum())
    return len(counts) - 1 - index, int(from_top[index - 1]) if index else 0


def magnitude_bits(tau: Tensor) -> Tensor:
    """|tau| as float32, its bits read as int32: monotone in the magnitude."""
    return tau.float().abs().view(torch.int32)
