"""Preprocessors that know a piece's result once they have looked at all pieces: nothing is written for them.

A pass over the task vectors asks the rule for each piece's new differences, uses them, and drops them.

Legend: `K` experts, `*S` shape of a parameter or of some rows of it.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.preprocess import Preprocess
from trainmerge.task_vectors import Delta, TaskVectors

PIECE = 1 << 17  # entries: 512 KiB of float32, so that what is done to K of them stays in the cache
Rule = Callable[[str, Delta], Tensor]  # a piece's name and differences -> its K new differences, [K, *S]


@dataclass(frozen=True)
class Piecewise(Preprocess):
    """New task vectors from old, a piece at a time, in any order and any number of times.

    An entry's result depends on its own place, and on what `rule` measures of all parameters first.
    """

    @abstractmethod
    def rule(self, task_vectors: TaskVectors) -> Rule:
        """Measure what must be known of all; what comes back answers for the pieces of `in_pieces`."""

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        for name, results in groupby(self.in_pieces(task_vectors), key=lambda result: result[0]):
            first, *more = [taus for _, taus in results]
            yield name, torch.cat([first, *more], dim=1) if more else first

    def in_pieces(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        """The same with large parameters in several pieces [K, *S], consecutive rows."""
        rule = self.rule(task_vectors)
        for name, delta in task_vectors.deltas.items():
            for _, piece, part in in_pieces(name, delta):
                yield name, rule(piece, part)


def in_pieces(name: str, delta: Delta, entries: int | None = None) -> Iterator[tuple[slice, str, Delta]]:
    """A parameter's rows, in order, a piece's name, and its differences; a small parameter is one piece.

    Pieces have about `entries` entries. A rule's results may depend on that; the default is `PIECE`.
    """
    entries = entries or PIECE
    size = delta.shape.numel()
    if size <= entries:
        yield slice(None), name, delta
        return
    rows = max(1, entries * delta.shape[0] // size)
    for first in range(0, delta.shape[0], rows):
        part = slice(first, min(first + rows, delta.shape[0]))
        yield part, f"{name}[{part.start}:{part.stop}]", delta.rows(part)
