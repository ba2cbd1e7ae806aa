"""Trim: each expert's largest entries, with a density of its own; and the densities that a search tries.

Evo-Merging (arXiv 2509.12951) searches such a density and a signed scale per expert.

Legend: `K` experts, `*S` shape of a parameter or of some rows of it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.piecewise import Piecewise, Rule
from trainmerge.preprocess.ties import trim_, trimming
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.pieces import in_pieces
from trainmerge.task_vectors.top_k import Limit, count, cut_near, histograms


@dataclass(frozen=True)
class Trim(Piecewise):
    """Keep each expert's largest entries over all its parameters; the others become 0.

    Its merge is base + sum_k c_k x the result, with any coefficients. No signs are elected: see `Ties`. The
    count is exact; of equal entries the first ones are kept.

    Args:
        density: Fraction of entries to keep, in (0, 1]: one number, or one per expert in the recipe's order.
    """

    density: float | Sequence[float] = 0.2

    def __post_init__(self) -> None:
        check_fields(self, density="(0, 1]")
        if isinstance(self.density, Sequence):
            object.__setattr__(self, "density", tuple(self.density))  # equal to one from a file

    @override
    def rule(self, task_vectors: TaskVectors) -> Rule:
        experts = len(task_vectors.experts)
        if isinstance(self.density, Sequence) and len(self.density) != experts:
            raise ValueError(
                f"Trim.density has {len(self.density)} numbers for {experts} experts; give one, or one each"
            )
        return Trimmed({name: row for name, row, _ in trimming(task_vectors, self.density, "global")})


@dataclass(frozen=True)
class Trimmed:
    """The rule of `Trim` after its pass: each piece's limits."""

    limits: Mapping[str, tuple[Limit, ...]]

    def __call__(self, name: str, delta: Delta) -> Tensor:
        """A piece's new differences, [K, *S]."""
        return trim_(delta.dense(), self.limits[name])


@dataclass(frozen=True)
class TrimmedAt:
    """The same with one limit per expert for all pieces."""

    limits: tuple[Limit, ...]

    def __call__(self, name: str, delta: Delta) -> Tensor:
        """A piece's new differences, [K, *S]."""
        del name
        return trim_(delta.dense(), self.limits)


class Magnitudes:
    """Every expert's magnitudes, counted in one pass: gives the rule of any densities without another.

    Counts are of the upper 16 bits of a float32, so neighbouring limits differ by less than 1%.
    """

    def __init__(self, task_vectors: TaskVectors) -> None:
        def pieces() -> Iterator[Tensor]:
            for name, delta in task_vectors.deltas.items():
                for _, _, part in in_pieces(name, delta):
                    taus = part.dense()
                    yield taus.view(len(taus), -1)  # also of a single number, as CLIP's temperature

        self._counts = histograms(pieces)  # K

    def trim(self, densities: Sequence[float]) -> tuple[tuple[float, ...], Rule]:
        """The densities in reach just above `densities`, both [K], and the rule of `Trim` with them.

        The rule gives what the method gives, bit for bit.
        """
        found = [
            cut_near(own, count(int(own.sum()), share))
            for own, share in zip(self._counts, densities, strict=True)
        ]
        kept = tuple(
            share_of_count(passed, int(own.sum()))
            for own, (_, passed) in zip(self._counts, found, strict=True)
        )
        return kept, TrimmedAt(tuple(limit for limit, _ in found))


def share_of_count(kept: int, size: int) -> float:
    """The density that keeps exactly `kept` of `size` entries, for any size.

    >>> share_of_count(1, 4)
    0.25
    """
    share = kept / size
    while count(size, share) < kept:
        share = math.nextafter(share, 2.0)
    return share
