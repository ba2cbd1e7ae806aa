"""Rows of vocabularies matched by token: which row of one model's embedding belongs to which of another's.

A row's key is its token. A row without a token, as padding leaves them, has its number as key.

Legend: `R` rows of the merge's embedding, `N` rows of one model's, `*S` the shape of one row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from trainmerge.checkpoints.choice import BASE

BLOCK = 1 << 12  # rows at a time

Key = str | int
Read = Callable[[Tensor], Tensor]  # row numbers [n] -> these rows [n, *S]


def keys_of(tokens: Mapping[int, str], rows: int) -> dict[Key, int]:
    """The row of each key, in the order of rows; `tokens` are by id.

    >>> keys_of({0: "a", 2: "b", 3: "beyond"}, rows=3)
    {'a': 0, 1: 1, 'b': 2}
    """
    first: dict[str, int] = {}
    for i in sorted(tokens):
        if i < rows:
            first.setdefault(tokens[i], i)
    names: dict[int, Key] = {i: token for token, i in first.items()}
    return {names.get(i, i): i for i in range(rows)}


def rows_in(wanted: Mapping[Key, int], own: Mapping[Key, int]) -> Tensor:
    """For each wanted key, in order, its row among a model's own; -1 where it has none.

    >>> rows_in({"a": 0, "b": 1}, {"b": 0}).tolist()
    [-1, 0]
    """
    return torch.tensor([own.get(key, -1) for key in wanted], dtype=torch.long)


def base_rows(read: Read, own: Tensor, others: Sequence[tuple[Read, Tensor]], part: slice) -> Tensor:
    """The base's rows of the merge's vocabulary, in float64; NaN where no model has a row.

    A token that the base lacks gets the mean of the rows of the experts that have it.

    Args:
        read: The base's rows.
        own: The base's row of each row of the merge, or -1. [R]
        others: The same of each expert.
        part: The rows of the merge to compute.
    """
    rows = own[part]
    made = read(rows.clamp(min=0)).double()
    absent = rows < 0
    if not bool(absent.any()):
        return made
    total = torch.zeros_like(made[absent])
    count = torch.zeros(len(total), dtype=torch.float64).view(-1, *[1] * (made.dim() - 1))
    for theirs, places in others:
        has = places[part][absent] >= 0
        if bool(has.any()):
            total[has] += theirs(places[part][absent][has]).double()
            count[has] += 1
    made[absent] = total / count  # 0 / 0 is NaN
    return made


def expert_rows(read: Read, own: Tensor, base: Tensor, unknown: Tensor, part: slice) -> Tensor:
    """An expert's rows of the merge's vocabulary: its own, the base's where it lacks the token.

    Args:
        read: The expert's rows.
        own: The expert's row of each row of the merge, or -1. [R]
        base: The base's rows of this part. [part, *S]
        unknown: Rows that no model has; NaN there. [part]
        part: The rows of the merge to compute.
    """
    rows = own[part]
    made = base.double()
    made[unknown] = torch.nan
    if bool((has := rows >= 0).any()):
        made[has] = read(rows[has]).double()
    return made


@dataclass(frozen=True)
class GivenRow:
    """A row of the merge that is chosen by hand."""

    side: str | None  # whose it is; None: zeros
    row: int  # there
    force: bool  # of all models, not only of those that lack the token


@dataclass(frozen=True)
class Matched:
    """One tensor with a row per token: how to read its rows of base and experts, and where those are."""

    reads: Mapping[str, Read]  # "base" and every expert
    rows: Mapping[str, Tensor]  # the row of each row of the merge, or -1. [R]
    shape: tuple[int, ...]  # of the merge's. [R, *S]
    dtypes: Mapping[str, torch.dtype]  # of the tensors that are written
    given: Mapping[int, GivenRow] = field(default_factory=dict)  # row of the merge -> the chosen one
    equal: bool = False  # a model that lacks a token has the mean of all others' rows, not the base's

    @cached_property
    def absent(self) -> Tensor:
        """Whether no model has a row, [R]."""
        absent = torch.stack([*self.rows.values()]).lt(0).all(dim=0)
        absent[list(self.given)] = False
        return absent

    @property
    def parts(self) -> list[slice]:
        """The blocks of rows."""
        count = self.shape[0]
        return [slice(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)]

    def of_base(self, part: slice) -> Tensor:
        """The base's rows, in float64; NaN for rows that no model has."""
        others = [(read, self.rows[name]) for name, read in self.reads.items() if name != BASE]
        made = base_rows(self.reads[BASE], self.rows[BASE], others, part)
        return self._with_given(made, BASE, part)

    def of(self, name: str, part: slice) -> Tensor:
        """One side's rows, in float64; NaN for rows that no model has."""
        if name == BASE:
            return self.of_base(part)
        base = (self._mean(part) if self.equal else self.of_base(part)).to(self.dtypes[BASE])
        made = expert_rows(self.reads[name], self.rows[name], base, self.absent[part], part)
        return self._with_given(made, name, part)

    def _mean(self, part: slice) -> Tensor:
        """The mean of each token's rows over all models that have it."""
        nowhere = torch.full((self.shape[0],), -1)
        return base_rows(
            self.reads[BASE], nowhere, [(read, self.rows[k]) for k, read in self.reads.items()], part
        )

    def _with_given(self, made: Tensor, name: str, part: slice) -> Tensor:
        """One side's rows with those that are chosen, in the base's precision: the same for all sides."""
        for row, given in self.given.items():
            if part.start <= row < part.stop and (given.force or self.rows[name][row] < 0):
                chosen = torch.zeros(self.shape[1:], dtype=torch.float64)
                if given.side is not None:
                    chosen = self.reads[given.side](torch.tensor([given.row]))[0]
                made[row - part.start] = chosen.to(self.dtypes[BASE]).double()
        return made

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One side's tensor. A row that no model has is the mean of all others: never the likeliest."""
        absent = self.absent
        mean = torch.zeros(self.shape[1:], dtype=torch.float64)
        if bool(absent.any()):
            for part in self.parts:
                mean += self.of(name, part)[~absent[part]].sum(dim=0)
            mean /= int((~absent).sum())
        for part in self.parts:
            rows = self.of(name, part)
            rows[absent[part]] = mean
            yield rows.to(self.dtypes[name])

    def moves(self, name: str) -> bool:
        """Whether a side's tensor differs from the one of its file."""
        forced = any(given.force for given in self.given.values())
        return forced or not torch.equal(self.rows[name], torch.arange(self.shape[0]))

    def differs(self, name: str) -> bool:
        """Whether an expert's rows differ from the base's."""
        pairs = zip(self.pieces(name), self.pieces(BASE), strict=True)
        return any(not torch.equal(own, base.to(own.dtype)) for own, base in pairs)
