"""Row shards: this process's rows of a parameter, and the task vectors over these rows.

FSDP2 splits dimension 0 as `torch.chunk` does: ceil(rows / N) rows per process, the last ones fewer or none.
A merge is elementwise, so a process reads and writes only its own rows of base and task vectors, views of the
mapped files; the inner products of all processes add up to those of the whole parameter. The rows of a
mixture's parameter are its experts: one that has a tensor of its own in the files is whole in one shard.

Legend: `K` experts, `C` chunks of one tensor, `N` processes, `*S` parameter shape, `H` rows of a shard.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor
from torch.distributed.tensor import DTensor

from trainmerge.kernels import Merge, Product, chunk_bounds
from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.places import is_place, rows_within, view


def shard_rows(rows: int, process: int, processes: int) -> slice:
    """The rows of a process's shard.

    >>> [shard_rows(5, process, 4) for process in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    size = -(-rows // processes)
    return slice(min(process * size, rows), min((process + 1) * size, rows))


def local(tensor: Tensor) -> Tensor:
    """The local shard: rows [H, ...] if the tensor is sharded, else the whole tensor. A view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shares_storage(parameter: Tensor, base: Tensor) -> bool:
    """Whether a parameter, or this process's shard of it, starts at the same address as `base`."""
    return base.numel() > 0 and local(parameter).data_ptr() == base.data_ptr()


def local_rows(parameter: Tensor) -> slice:
    """The rows of the whole parameter that `local(parameter)` contains."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    mesh = parameter.device_mesh
    return shard_rows(parameter.shape[0], mesh.get_local_rank(), mesh.size())


@dataclass(frozen=True)
class RowShard:
    """The rows of a tensor of the files that this process's shard of its parameter contains."""

    rows: slice
    count: int  # rows of the whole tensor
    inside: str  # where these rows are in the shard; empty if it has none of them

    @staticmethod
    def of(inside: str, parameter: Tensor) -> "RowShard | None":
        """Those of the parameter itself or of a place in it; None if the parameter is not sharded.

        Raises:
            ValueError: a place whose rows are columns of the parameter.
        """
        if not isinstance(parameter, DTensor):
            return None
        held = local_rows(parameter)
        if not is_place(inside):
            return RowShard(held, parameter.shape[0], inside)
        return RowShard(*rows_within(inside, tuple(parameter.shape), held))

    def part(self, shard: Tensor) -> Tensor:
        """These rows in the shard [H, ...], or in its gradient: a view; empty if there are none."""
        return view(self.inside, shard) if self.inside else shard.new_empty(0)


@dataclass(frozen=True)
class DeltaShard:
    """A delta over one shard's rows, with the chunks of the whole tensor."""

    delta: Delta  # over the shard's rows only
    shard: slice  # their place in the whole
    rows: int  # of the whole

    def merges(self, out: Tensor, coefficients: Tensor) -> Iterator[Merge]:
        """The calls that write the shard's rows `out` [H, ...]: base + sum_k coefficients[k, chunk] tau_k."""
        for chunk, here in self._pieces(coefficients.shape[1]):
            yield from self.delta.rows(here).merges(out[here], coefficients[:, chunk : chunk + 1])

    def products(self, grad: Tensor, chunks: int) -> Iterator[tuple[slice, Product]]:
        """The calls of <grad, tau_k> over the shard's rows, `grad` [H, ...], and the chunk of each."""
        for chunk, here in self._pieces(chunks):
            ((_, product),) = self.delta.rows(here).products(grad[here], 1)
            yield slice(chunk, chunk + 1), product

    def _pieces(self, chunks: int) -> Iterator[tuple[int, slice]]:
        """Each chunk with rows in the shard, and these rows within the shard."""
        for chunk, (first, last) in enumerate(pairwise(chunk_bounds(self.rows, chunks))):
            begin, end = max(first, self.shard.start), min(last, self.shard.stop)
            if begin < end:
                yield chunk, slice(begin - self.shard.start, end - self.shard.start)


def delta_shards(deltas: Mapping[str, Delta], shards: Mapping[str, RowShard]) -> Mapping[str, Delta]:
    """Each delta over this process's rows of it: views, no data is read."""
    return {
        name: delta.rows(shards[name].rows) if name in shards else delta for name, delta in deltas.items()
    }


def as_shard(mine: Delta, shard: RowShard | None) -> Delta | DeltaShard:
    """A delta over a shard's rows, with their place in the whole tensor."""
    return mine if shard is None else DeltaShard(mine, shard.rows, shard.count)
