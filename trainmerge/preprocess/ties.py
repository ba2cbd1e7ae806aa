"""TIES: trim small values, elect a sign, keep the entries that agree with it.

Yadav et al., NeurIPS 2023 (arXiv 2306.01708).

Legend: `K` experts, `*S` shape of a parameter or of some rows of it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.piecewise import Piecewise, Rule
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.pieces import in_pieces
from trainmerge.task_vectors.top_k import Limit, count, cuts

SAMPLE = 1 << 22  # sampled entries of an expert, which estimate its threshold to a tenth of a per cent


@dataclass(frozen=True)
class Ties(Piecewise):
    """Trim, elect, and keep the agreeing entries of each expert.

    The paper's merge is base + coefficient x sum of the results: coefficient 1 for `mean`, which
    divides each entry by the number of experts that agree there, and 0.3 for `sum`, which does not
    (AdaMerging++ learns its coefficients on `sum`).

    Args:
        density: Fraction of entries to keep, in (0, 1].
        scope: `global` ranks an expert's entries over all its parameters, as the paper and its code do;
            `parameter` within each, as mergekit does.
        merge: `sum` or `mean` over the agreeing experts.
    """

    density: float = 0.2
    scope: Literal["global", "parameter"] = "global"
    merge: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        check_fields(self, density="(0, 1]")

    @override
    def rule(self, task_vectors: TaskVectors) -> Rule:
        limits: dict[str, tuple[Limit, ...]] = {}
        balance = 0.0
        for name, row, trimmed in trimming(task_vectors, self.density, self.scope):
            limits[name] = row
            summed = total(trimmed).numpy()  # counts faster than torch
            balance += np.count_nonzero(summed > 0) - np.count_nonzero(summed < 0)
        majority = float(balance > 0) - float(balance < 0)
        return Elected(limits, majority, self.merge)


@dataclass(frozen=True)
class Elected:
    """The rule of TIES after its first pass: each piece's limits, and the majority sign of all entries."""

    limits: Mapping[str, tuple[Limit, ...]]
    majority: float  # decides where the sum of all experts is zero
    merge: Literal["sum", "mean"]

    def __call__(self, name: str, delta: Delta) -> Tensor:
        """A piece's new differences, [K, *S]."""
        return disjoint(trim_(delta.dense(), self.limits[name]), self.majority, self.merge)


def trimming(
    task_vectors: TaskVectors, density: float | Sequence[float], scope: Literal["global", "parameter"]
) -> Iterator[tuple[str, tuple[Limit, ...], Tensor]]:
    """Every piece's name, the limits of each expert's largest entries, its trimmed differences [K, *S].

    `density` is one for all experts, or K.
    """
    parameters = [list(_pieces(name, delta)) for name, delta in task_vectors.deltas.items()]
    ranked = [list(chain(*parameters))] if scope == "global" else parameters
    for pieces in ranked:
        yield from _trimmed(pieces, density)


def _pieces(name: str, delta: Delta) -> Iterator[tuple[str, Delta]]:
    return ((piece, part) for _, piece, part in in_pieces(name, delta))


def _trimmed(
    pieces: Sequence[tuple[str, Delta]], density: float | Sequence[float]
) -> Iterator[tuple[str, tuple[Limit, ...], Tensor]]:
    """Every piece's limits, ranked over all `pieces`, and its trimmed differences [K, *S]."""
    deltas = [delta for _, delta in pieces]
    size, experts = sum(delta.shape.numel() for delta in deltas), len(deltas[0].terms)
    every = max(1, size // SAMPLE)
    thin = [delta.rows(slice(None, None, every)) if delta.shape else delta for delta in deltas]

    def flat(deltas: Sequence[Delta]) -> Iterator[Tensor]:
        return (delta.dense().view(experts, -1) for delta in deltas)

    shares = density if isinstance(density, Sequence) else [density] * experts
    some = sum(delta.shape.numel() for delta in thin)
    wanted, of_sample = ([count(entries, share) for share in shares] for entries in (size, some))
    found = cuts(partial(flat, deltas), wanted, partial(flat, thin), of_sample)
    for name, delta in pieces:
        taus = delta.dense()
        limits = tuple(cut.limit(tau) for cut, tau in zip(found, taus, strict=True))
        yield name, limits, trim_(taus, limits)


def trim_(taus: Tensor, limits: Iterable[Limit]) -> Tensor:
    """`taus` [K, *S], trimmed in place."""
    for tau, limit in zip(taus, limits, strict=True):
        limit.trim_(tau)
    return taus


def disjoint(trimmed: Tensor, majority: float, merge: Literal["sum", "mean"]) -> Tensor:
    """Keep, in place, the entries of `trimmed` [K, *S] with the elected sign; `mean` divides them."""
    sign = total(trimmed).sign_()
    sign.sub_(sign.abs().sub_(1), alpha=majority)  # where it is 0
    agreeing = trimmed.mul_(sign).clamp_min_(0)  # magnitudes
    if merge == "mean":
        agreeing /= total(agreeing.sign()).clamp_min_(1)
    return agreeing.mul_(sign)


def total(taus: Tensor) -> Tensor:
    """The sum over K, in order; a few long rows are added faster than torch reduces them."""
    summed = taus[0].clone() if len(taus) == 1 else taus[0] + taus[1]
    for tau in taus[2:]:
        summed += tau
    return summed
