"""Several processes score one model, each its share of the examples, under `torchrun` or one like it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


@contextmanager
def together() -> Iterator[bool]:
    """Join the launcher's other processes, if there are any; yields whether this one prints and writes.

    Over gloo: what is reduced are a few numbers, and they are on the CPU.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if several:
        dist.init_process_group("gloo")
    try:
        yield rank() == 0
    finally:
        if several:
            dist.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 of a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of n processes."""
    return items[rank() :: world_size()]


def gathered(own: Mapping[int, T]) -> dict[int, T]:
    """What all processes found, on each of them."""
    if world_size() == 1:
        return dict(own)
    found: list[Mapping[int, T]] = [{} for _ in range(world_size())]
    dist.all_gather_object(found, own)
    return {key: value for part in found for key, value in part.items()}
