"""One parameter's differences of all tasks, read in blocks of rows; and the run's merge of it.

Every shape is seen as a matrix [R, W]: rows of dimension 0, the other dimensions in one.

Legend: `K` tasks, `R` rows, `W` entries of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trainmerge.kernels import Difference, ExpertWeight, Term
from trainmerge.packed.bits import ALIGNED
from trainmerge.task_vectors.changes import Change
from trainmerge.task_vectors.delta import Delta, dense_term

BLOCK = 1 << 17  # entries that are read at a time, of each of K tasks


@dataclass(frozen=True)
class Parameter:
    """What a codec encodes.

    Args:
        name: The base's tensor.
        whole: Its base and K differences.
        change: The run's merge of it; None if the run does not merge it.
    """

    name: str
    whole: Delta
    change: Change | None = None

    @cached_property
    def delta(self) -> Delta:
        """Base and differences, of at least one dimension."""
        return self.whole if self.whole.shape else _one_row(self.whole)

    @property
    def shape(self) -> torch.Size:
        """[R, W]."""
        return as_matrix(self.whole.shape)

    @property
    def tasks(self) -> int:
        """K."""
        return len(self.whole.terms)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive rows with their differences [K, r, W], float32 or wider."""
        for part in blocks(self.shape):
            some = self.delta.rows(part).dense()
            yield part, some.reshape(self.tasks, -1, self.shape[1])

    def tau(self, task: int) -> Tensor:
        """One task's difference [R, W], float32 or wider."""
        return dense_term(self.delta.terms[task], self.delta.base).reshape(self.shape)

    def merged(self) -> Tensor:
        """The run's change [R, W] in float32; the sum of all tasks' where the run merges nothing."""
        if self.change is None:
            return self.total()
        return self.change.dense(torch.float32).reshape(self.shape)

    def total(self) -> Tensor:
        """The sum of all tasks' differences, [R, W] float32."""
        out = torch.empty(self.shape)
        for part, taus in self.blocks():
            out[part] = taus.sum(dim=0)
        return out

    def squares(self) -> Tensor:
        """The squared norm of every task's difference, [K] float64."""
        total = torch.zeros(self.tasks, dtype=torch.float64)
        for _, taus in self.blocks():
            total += taus.double().square().sum(dim=(1, 2))
        return total


def as_matrix(shape: torch.Size) -> torch.Size:
    """[R, W] of a parameter's shape."""
    return torch.Size([shape[0] if shape else 1, shape[1:].numel()])


def blocks(shape: torch.Size) -> Iterator[slice]:
    """Rows of [R, W] at a time; each block begins with a whole byte of bits and of trits."""
    step = max(1, BLOCK // max(1, shape[1]) // ALIGNED) * ALIGNED
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))


def _one_row(delta: Delta) -> Delta:
    """A scalar parameter as one of shape [1]."""

    def term(old: Term) -> Term:
        match old:
            case Difference(tau):
                return Difference(tau.view(1))
            case ExpertWeight(weight):
                return ExpertWeight(weight.view(1))
        return old

    return Delta(delta.base.view(1), tuple(map(term, delta.terms)), delta.role)
