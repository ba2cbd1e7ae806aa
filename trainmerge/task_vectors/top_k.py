"""Exact top-k of numbers that do not fit in memory at once, without sort or copy.

Numbers are nonnegative float32, whose bit patterns have the same order as integers. So two passes that count
the upper and the lower 16 bits find the k-th largest. A sample replaces the first of them.

Legend: `K` rows, ranked separately; `n` numbers of one piece.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainmerge.kernels import Term
from trainmerge.task_vectors.delta import dense_term

Pieces = Callable[[], Iterable[Tensor]]  # each call iterates over all pieces [K, n]
Counts = int | Sequence[int]  # one for all rows, or one each
UPPER, LOWER = 1 << 15, 1 << 16  # values of the upper bits of a non-negative float32, and of the lower
INFINITE = 0x7F800000  # infinity's bits


class Limit(NamedTuple):
    """The limit of one piece: entries above a magnitude pass, and the first few that equal it."""

    bits: int  # the magnitude, as a float32's bits
    admitted: int | None  # how many of the entries equal to it, in order; None for all

    def trim_(self, tau: Tensor) -> Tensor:
        """Set all other entries of `tau` to zero, in place."""
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
    """Keeps the entries above a magnitude, and the first `ties` that equal it; pieces come in order."""

    def __init__(self, bits: int, ties: int) -> None:
        self.bits, self.ties = bits, ties

    def limit(self, tau: Tensor) -> Limit:
        """The limit of `tau`, the next piece."""
        equal = int(np.count_nonzero(_bits(tau) == self.bits)) if self.ties else 0
        admitted = min(self.ties, equal)
        self.ties -= admitted
        return Limit(self.bits, None if 0 < equal == admitted else admitted)

    def __call__(self, tau: Tensor) -> Tensor:
        """`tau` with the entries below the cut set to zero."""
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


def cuts(pieces: Pieces, wanted: Counts, sample: Pieces | None = None, of_sample: Counts = 1) -> list[Cut]:
    """K cuts, each keeping the `wanted` largest magnitudes of its row.

    A `sample`, with about how many of it are wanted, narrows the range, so that one pass over all pieces is
    enough. If the range misses, two more passes follow. The result does not depend on it.

    Raises:
        ValueError: a magnitude that decides is not finite.
    """
    if sample is not None:
        found = _ranked(pieces, [range(max(b - 1, 0), b + 2) for b in _buckets(sample, of_sample)], wanted)
        if found is not None:
            return found
    found = _ranked(pieces, [range(b, b + 1) for b in _buckets(pieces, wanted)], wanted)
    if found is None:
        raise ValueError(
            "magnitudes that are not finite cannot be ranked: `trainmerge inspect` names the tensors"
        )
    return found


def histograms(pieces: Pieces) -> list[Tensor]:
    """How many magnitudes of each row have each value of the upper 16 bits: K int64 [UPPER]."""
    counters: list[_Counter] = []
    for piece in pieces():
        counters = counters or [_Counter(UPPER) for _ in piece]
        for counter, row in zip(counters, piece, strict=True):
            counter.add(_bits(row) >> 16)
    return [counter.counts() for counter in counters]


def cut_near(counts: Tensor, wanted: int) -> tuple[Limit, int]:
    """The limit between two buckets that passes `wanted` entries or a few more, and how many it passes."""
    bucket, above = _bucket(counts, wanted)
    return Limit(bucket * LOWER, None), above + int(counts[bucket])


def _each(wanted: Counts, rows: int) -> Sequence[int]:
    return [wanted] * rows if isinstance(wanted, int) else wanted


def _ranked(pieces: Pieces, buckets: Sequence[range], wanted: Counts) -> list[Cut] | None:
    """The cuts, if each lies in its row's `buckets` of the upper 16 bits."""
    above = [0] * len(buckets)
    inside = [_Counter(len(own) * LOWER) for own in buckets]
    limits = [(_float(own.start * LOWER), _float(own.stop * LOWER)) for own in buckets]
    for piece in pieces():
        for k, (row, (low, high)) in enumerate(zip(piece, limits, strict=True)):
            magnitudes = row.float().abs().numpy()  # numpy filters faster than torch
            beyond = magnitudes >= high
            above[k] += int(np.count_nonzero(beyond))
            within = magnitudes[np.flatnonzero((magnitudes >= low) ^ beyond)].view(np.int32)
            inside[k].add(within - buckets[k].start * LOWER)
    ranks = _each(wanted, len(buckets))
    if any(not over < rank <= over + own.size for over, rank, own in zip(above, ranks, inside, strict=True)):
        return None
    left = [rank - over for rank, over in zip(ranks, above, strict=True)]
    places = [_bucket(own.counts(), rank) for own, rank in zip(inside, left, strict=True)]
    return [
        Cut(own.start * LOWER + place, rank - more)
        for own, rank, (place, more) in zip(buckets, left, places, strict=True)
    ]


class _Counter:
    """Counts of small integers, in large batches, because each histogram costs its length."""

    def __init__(self, length: int) -> None:
        self.size, self._new = 0, list[NDArray[np.int32]]()
        self._waiting, self._counts = 0, np.zeros(length, np.int64)

    def add(self, numbers: NDArray[np.int32]) -> None:
        self._new.append(numbers)
        self._waiting += len(numbers)
        self.size += len(numbers)
        if self._waiting > len(self._counts):
            self.counts()

    def counts(self) -> Tensor:
        if self._new:
            self._counts += np.bincount(np.concatenate(self._new), minlength=len(self._counts))
            self._new, self._waiting = [], 0
        return torch.from_numpy(self._counts)


def _buckets(pieces: Pieces, wanted: Counts) -> list[int]:
    """The upper 16 bits of each row's `wanted`-th largest magnitude."""
    found = histograms(pieces)
    return [_bucket(own, rank)[0] for own, rank in zip(found, _each(wanted, len(found)), strict=True)]


def _bucket(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bucket that holds the `wanted`-th largest entry, and how many entries lie above it."""
    from_top = counts.flip(0).cumsum(0)
    index = int((from_top < wanted).sum())
    return len(counts) - 1 - index, int(from_top[index - 1]) if index else 0


def magnitude_bits(tau: Tensor) -> Tensor:
    """|tau| as float32, its bits read as int32: monotone in the magnitude."""
    return tau.float().abs().view(torch.int32)


def _bits(tau: Tensor) -> NDArray[np.int32]:
    """The same as a new numpy array, which filters faster than torch."""
    bits: NDArray[np.int32] = magnitude_bits(tau).numpy()
    return bits


def _float(bits: int) -> float:
    """The magnitude with these bits; infinity for all beyond it."""
    return float(np.int32(min(bits, INFINITE)).view(np.float32))
