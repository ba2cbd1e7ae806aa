"""Methods for matrices: everything else is averaged.

Legend: `K` experts, `m x n` a matrix (outputs x inputs).
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Preprocess
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.parameter_names import matches
from trainmerge.task_vectors.roles import each_matrix


def is_matrix(name: str, delta: Delta, exclude: Sequence[str]) -> bool:
    """Whether a parameter is a matrix, or a stack of matrices, that `exclude` does not name.

    One matrix of a parameter may have its number after the name, as in `w#0` (`core_space`).
    """
    return delta.matrices > 0 and not matches(name.partition("#")[0], exclude)


class PerMatrix(Preprocess):
    """A method of each matrix, or stack of matrices; other parameters, and `exclude`, are divided by K."""

    exclude: Sequence[str]
    otherwise: ClassVar[str] = "divided by K"

    @abstractmethod
    def matrices(self, taus: Tensor) -> Tensor:
        """New differences [K, m, n] of one matrix."""

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        for name, delta in task_vectors.deltas.items():
            taus = delta.dense()
            if self.applies_to(name, delta):
                yield name, each_matrix(taus, delta.role, self.matrices)
            else:
                yield name, taus / len(taus)

    @override
    def applies_to(self, name: str, delta: Delta) -> bool:
        return is_matrix(name, delta, self.exclude)
