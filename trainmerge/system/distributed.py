"""Collectives over torch.distributed; a single process without a process group.

Lightning's strategy creates the group of a fit; `joined` that of a command started by torchrun.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainmerge.system.text import listed

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """In this context the processes that torchrun started form a group; a single process has none.

    Uses gloo, because these commands exchange a few numbers on the CPU.

    Raises:
        ValueError: see `processes_started`.
    """
    started = processes_started(os.environ)
    if started == 1 or world_size() > 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def processes_started(environment: Mapping[str, str]) -> int:
    """The number of processes that torchrun started, from its environment variables; 1 without torchrun.

    Raises:
        ValueError: WORLD_SIZE is not a positive number, or it names several processes, but the variables of
            their rendezvous are not set.
    """
    given = environment.get("WORLD_SIZE", "").strip() or "1"
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(
            f"WORLD_SIZE is {given!r}, not a number of processes: start with torchrun, which sets it, or "
            "unset it to run one process"
        )
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name, "")]
    if int(given) > 1 and absent:
        raise ValueError(
            f"WORLD_SIZE is {given}, but {listed(absent)} {'is' if len(absent) == 1 else 'are'} not set: "
            "start with torchrun, which sets them all, or unset WORLD_SIZE to run one process"
        )
    return int(given)


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def broadcast(value: T) -> T:
    """Process 0's value, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather(value: T) -> list[T]:
    """Every process's value, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather(value: T) -> list[T]:
    """Every process's value, in the order of ranks, on process 0; empty on the others."""
    if world_size() == 1:
        return [value]
    values: list[T] | None = [value] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


@torch.no_grad()
def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over processes; does not change its argument."""
    if world_size() == 1:
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Process 0 runs this context first, the others after it, so that they find its files.

    If process 0 fails, no other process runs it.

    Raises:
        ChildProcessError: on the other processes, with the error of process 0.
    """
    if rank() > 0:
        if words := broadcast(""):
            raise ChildProcessError(f"process 0: {words}")
        yield
        return
    try:
        yield
    except BaseException as error:
        broadcast(f"{type(error).__name__}: {error}")
        raise
    broadcast("")


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of n processes."""
    return items[rank() :: world_size()]


def merge_shares(own: Mapping[int, T]) -> dict[int, T]:
    """The union of all processes' mappings, on every process."""
    return {key: value for part in all_gather(own) for key, value in part.items()}


def is_collective_error(error: RuntimeError) -> bool:
    """Whether the error comes from a collective, not from this process's own work."""
    text = str(error)  # gloo raises plain RuntimeErrors
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset")
    )
