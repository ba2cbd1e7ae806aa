"""The rows of a parameter that this process holds, and its task vectors over just these rows.

FSDP2 splits dimension 0 as `torch.chunk` does: ceil(rows / N) rows a process, the last ones fewer or none.
A merge is linear and row by row, so a process reads and writes only its own rows of base and task vectors,
views of the mapped files; the inner products of all processes add up to those of the whole.

Legend: `K` experts, `C` chunks of one parameter, `N` processes, `*S` parameter shape, `H` rows held here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor
from torch.distributed.tensor import DTensor

from trainmerge.kernels import Merge, Product, chunk_bounds
from trainmerge.task_vectors.delta import Delta


def held_rows(rows: int, process: int, processes: int) -> slice:
    """Which of `rows` a process holds.

    >>> [held_rows(5, process, 4) for process in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    size = -(-rows // processes)
    return slice(min(process * size, rows), min((process + 1) * size, rows))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it: its rows [H, ...] if it is sharded, else all of it. A view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(parameter: Tensor) -> slice:
    """The rows that `local(parameter)` are of the whole."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    mesh = parameter.device_mesh
    return held_rows(parameter.shape[0], mesh.get_local_rank(), mesh.size())


@dataclass(frozen=True)
class HeldDelta:
    """A delta of the rows that this process holds; chunks are those of the whole parameter."""

    delta: Delta  # of these rows only
    held: slice  # which they are
    rows: int  # of the whole

    def merges(self, out: Tensor, coefficients: Tensor) -> Iterator[Merge]:
        """The calls that write the held rows of base + sum_k coefficients[k, chunk] tau_k, `out` [H, ...]."""
        for chunk, here in self._pieces(coefficients.shape[1]):
            yield from self.delta.rows(here).merges(out[here], coefficients[:, chunk : chunk + 1])

    def products(self, grad: Tensor, chunks: int) -> Iterator[tuple[slice, Product]]:
        """The calls of <grad, tau_k> over the held rows, `grad` [H, ...], and which chunk each is about."""
        for chunk, here in self._pieces(chunks):
            ((_, product),) = self.delta.rows(here).products(grad[here], 1)
            yield slice(chunk, chunk + 1), product

    def _pieces(self, chunks: int) -> Iterator[tuple[int, slice]]:
        """Each chunk that this process holds rows of, and which of the held ones they are."""
        for chunk, (first, last) in enumerate(pairwise(chunk_bounds(self.rows, chunks))):
            begin, end = max(first, self.held.start), min(last, self.held.stop)
            if begin < end:
                yield chunk, slice(begin - self.held.start, end - self.held.start)


def held_deltas(deltas: Mapping[str, Delta], parameters: Mapping[str, Tensor]) -> Mapping[str, Delta]:
    """Of each delta the rows that this process holds of the parameter: views, nothing is read."""
    return {
        name: delta.rows(rows_of(parameters[name])) if isinstance(parameters[name], DTensor) else delta
        for name, delta in deltas.items()
    }


def placed(mine: Delta, parameter: Tensor) -> Delta | HeldDelta:
    """A delta of the held rows, with its place in the whole parameter."""
    if not isinstance(parameter, DTensor):
        return mine
    return HeldDelta(mine, rows_of(parameter), parameter.shape[0])
