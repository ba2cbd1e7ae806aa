"""The processes of a fit, over torch.distributed: one where no process group was made.

Lightning's strategy makes the group of a fit, `together.joined` that of an export under torchrun.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def barrier() -> None:
    """Wait for all processes."""
    if count() > 1:
        dist.barrier()


def from_first(value: T) -> T:
    """Process 0's value, on every process."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: T) -> list[T]:
    """Every process's value, in the order of ranks."""
    if count() == 1:
        return [value]
    values: list[T] = [value] * count()
    dist.all_gather_object(values, value)
    return values


def at_first(value: T) -> list[T]:
    """Every process's value, in the order of ranks, on process 0; nothing on the others."""
    if count() == 1:
        return [value]
    values: list[T] | None = [value] * count() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


@torch.no_grad()
def total(tensor: Tensor) -> Tensor:
    """The sum over processes; the argument stays as it is."""
    if count() == 1:
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


@contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 goes through first, the others after it: they find in files what it has made."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()
