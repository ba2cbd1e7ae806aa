"""Methods for matrices: everything else is averaged.

Legend: `K` experts, `m x n` a matrix.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.parameter_names import matches


def matrices_or_average(
    task_vectors: TaskVectors, exclude: Sequence[str], method: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """`method` of each matrix's differences [K, m, n]; other parameters, and `exclude`, are divided by K."""
    for name, delta in task_vectors.deltas.items():
        taus = delta.dense()
        averaged = taus.dim() != 3 or matches(name, exclude)
        yield name, taus / len(taus) if averaged else method(taus)
