"""Preprocessors that compute each piece on the fly after one pass over all pieces; no file is written.

A pass over the task vectors calls the rule for each piece's new differences, uses them, and frees them.

Legend: `K` experts, `*S` shape of a parameter or of some rows of it.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Preprocess
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.pieces import in_pieces

Rule = Callable[[str, Delta], Tensor]  # a piece's name and differences -> its K new differences, [K, *S]


@dataclass(frozen=True)
class Piecewise(Preprocess):
    """New task vectors from old, one piece at a time, in any order and any number of times.

    An entry's result depends on its own position, and on what `rule` measures over all parameters first.
    """

    @abstractmethod
    def rule(self, task_vectors: TaskVectors) -> Rule:
        """Measure all parameters; returns the rule for the pieces of `in_pieces`."""

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        for name, results in groupby(self.in_pieces(task_vectors), key=lambda result: result[0]):
            first, *more = [taus for _, taus in results]
            yield name, torch.cat([first, *more], dim=1) if more else first

    def in_pieces(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        """The same with large parameters split into pieces [K, *S] of consecutive rows."""
        rule = self.rule(task_vectors)
        for name, delta in task_vectors.deltas.items():
            for _, piece, part in in_pieces(name, delta):
                yield name, rule(piece, part)
