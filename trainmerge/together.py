"""One folder written by several processes: started by torchrun, each its part, all or nothing."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from trainmerge import processes
from trainmerge.folders import staging

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that torchrun started are a group; one that was started alone stays alone."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ
    if alone or processes.count() > 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def agreed() -> Iterator[None]:
    """A part of the work that all processes finish, or none: those that could go on give up too.

    Raises what failed here, or ChildProcessError with the words of those that failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    words = processes.from_all(f"{type(error).__name__}: {error}" if error else "")
    if error is not None:
        raise error
    if any(words):
        raise ChildProcessError("; ".join(f"process {i}: {text}" for i, text in enumerate(words) if text))


def dealt(sizes: Mapping[T, int]) -> list[T]:
    """What falls to this process of some things: the largest first, each to whoever has least so far."""
    loads = [0] * processes.count()
    mine = []
    for thing in sorted(sizes, key=lambda thing: -sizes[thing]):
        least = loads.index(min(loads))
        loads[least] += sizes[thing]
        if least == processes.rank():
            mine.append(thing)
    return mine


@contextmanager
def staging_together(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """`staging` for all processes: the first makes and renames the folder, all may write into it.

    A failure of any process is one of all, and leaves nothing.
    """
    with ExitStack() as stack:
        with agreed():
            mine = stack.enter_context(staging(target, overwrite)) if processes.rank() == 0 else Path()
        folder = processes.from_first(mine)
        with agreed():
            yield folder
    processes.barrier()
