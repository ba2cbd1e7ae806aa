"""TIES: trim small values, elect a sign, keep what agrees with it.

Yadav et al., NeurIPS 2023 (arXiv 2306.01708).

Legend: `K` experts, `*S` parameter shape.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.kernels import Term
from trainmerge.preprocess.preprocess import Preprocess
from trainmerge.task_vectors import TaskVectors, dense_term


@dataclass(frozen=True)
class Ties(Preprocess):
    """Trim, elect, and keep the agreeing entries of each expert.

    The paper's merge is base + coefficient x sum of the results: coefficient 1 for `mean`, which
    divides each entry by the number of experts that agree there, and 0.3 for `sum`, which does not
    (AdaMerging++ learns its coefficients on `sum`).

    Args:
        density: Fraction of entries that trimming keeps, in (0, 1].
        scope: `global` ranks an expert's entries over all its parameters, as the paper and its code do;
            `parameter` within each, as mergekit does.
        merge: `sum` or `mean` over the agreeing experts.
    """

    density: float = 0.2
    scope: Literal["global", "parameter"] = "global"
    merge: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], not {self.density}")

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        majority = cache(lambda: self._majority(task_vectors))
        for name, trimmed in self._trimmed(task_vectors):
            yield name, disjoint(trimmed, majority, self.merge)

    def _trimmed(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's K trimmed differences, [K, *S]."""
        experts = range(len(task_vectors.experts))
        if self.scope == "global":
            every = task_vectors.deltas.values()
            cuts = [cut_at([(d.terms[k], d.base) for d in every], self.density) for k in experts]
        for name, delta in task_vectors.deltas.items():
            if self.scope == "parameter":
                cuts = [cut_at([(term, delta.base)], self.density) for term in delta.terms]
            rows = [cut(dense_term(term, delta.base)) for cut, term in zip(cuts, delta.terms, strict=True)]
            yield name, torch.stack(rows)

    def _majority(self, task_vectors: TaskVectors) -> Tensor:
        """The sign that most elected entries have: it decides where the sum of all experts is zero."""
        return torch.stack([t.sum(dim=0).sign().sum() for _, t in self._trimmed(task_vectors)]).sum().sign()


def disjoint(trimmed: Tensor, majority: Callable[[], Tensor], merge: Literal["sum", "mean"]) -> Tensor:
    """Keep the entries of `trimmed` [K, *S] that have the elected sign; for `mean`, share them out."""
    sign = trimmed.sum(dim=0).sign()
    if bool(((sign == 0) & (trimmed != 0).any(dim=0)).any()):
        sign = torch.where(sign == 0, majority().to(sign), sign)
    agreeing = trimmed * (trimmed.sign() == sign)
    if merge == "sum":
        return agreeing
    return agreeing / (agreeing != 0).sum(dim=0).clamp(min=1)


class Cut:
    """Keeps the entries above a magnitude, and the first `ties` of those that equal it. Stateful: in order.

    Magnitudes are compared as the integers that a float32's bits are, which have the same order.
    """

    def __init__(self, bits: int, ties: int) -> None:
        self.bits, self.ties = bits, ties

    def __call__(self, tau: Tensor) -> Tensor:
        """`tau` with everything below the cut set to zero."""
        bits = magnitude_bits(tau)
        equal = (bits == self.bits).flatten()
        admitted = equal & (equal.cumsum(0) <= self.ties)
        self.ties -= int(admitted.sum())
        return tau * ((bits > self.bits) | admitted.view(tau.shape))


def cut_at(entries: Sequence[tuple[Term, Tensor]], density: float) -> Cut:
    """The cut that keeps floor(density x size) entries, at least one, over all `entries` (term, base).

    Two passes count the magnitudes' upper and lower 16 bits: exact, with no sort and no copy.
    """
    size = sum(base.numel() for _, base in entries)
    wanted = max(1, int(density * size + 1e-6))  # 1e-6: 0.29 * 100 is 28.999...
    high, above = _bucket(_histogram(entries, lambda bits: bits >> 16), wanted)
    inside = _histogram(entries, lambda bits: bits[bits >> 16 == high] & 0xFFFF)
    low, above_low = _bucket(inside, wanted - above)
    return Cut((high << 16) | low, wanted - above - above_low)


def _histogram(entries: Sequence[tuple[Term, Tensor]], digits: Callable[[Tensor], Tensor]) -> Tensor:
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for term, base in entries:
        counts += torch.bincount(digits(magnitude_bits(dense_term(term, base)).flatten()), minlength=1 << 16)
    return counts


def _bucket(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bucket that holds the `wanted`-th largest entry, and how many entries lie above it."""
    from_top = counts.flip(0).cumsum(0)
    index = int((from_top < wanted).sum())
    return len(counts) - 1 - index, int(from_top[index - 1]) if index else 0


def magnitude_bits(tau: Tensor) -> Tensor:
    """|tau| as float32, its bits read as int32: monotone in the magnitude."""
    return tau.float().abs().view(torch.int32)
