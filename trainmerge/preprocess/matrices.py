"""Methods for matrices: everything else is averaged.

Legend: `K` experts, `m x n` a matrix (outputs x inputs).
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.parameter_names import matches
from trainmerge.task_vectors.roles import each_matrix


def is_matrix(name: str, delta: Delta, exclude: Sequence[str]) -> bool:
    """Whether a parameter is a matrix, or a stack of matrices, that `exclude` does not name."""
    return delta.matrices > 0 and not matches(name, exclude)


def matrices_or_average(
    task_vectors: TaskVectors, exclude: Sequence[str], method: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """`method` of each matrix's differences [K, m, n]; other parameters, and `exclude`, are divided by K."""
    for name, delta in task_vectors.deltas.items():
        taus = delta.dense()
        if is_matrix(name, delta, exclude):
            yield name, each_matrix(taus, delta.role, method)
        else:
            yield name, taus / len(taus)
