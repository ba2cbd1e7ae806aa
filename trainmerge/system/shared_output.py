"""One folder written by several processes: started by torchrun, each its part, all or nothing."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from trainmerge.system import distributed
from trainmerge.system.atomic import staging

T = TypeVar("T")


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
    words = distributed.all_gather(f"{type(error).__name__}: {error}" if error else "")
    if error is not None:
        raise error
    if any(words):
        raise ChildProcessError("; ".join(f"process {i}: {text}" for i, text in enumerate(words) if text))


def every_nth(sizes: Mapping[T, int]) -> list[T]:
    """What falls to this process of some things: the largest first, each to whoever has least so far."""
    loads = [0] * distributed.world_size()
    mine = []
    for thing in sorted(sizes, key=lambda thing: -sizes[thing]):
        least = loads.index(min(loads))
        loads[least] += sizes[thing]
        if least == distributed.rank():
            mine.append(thing)
    return mine


@contextmanager
def staging_shared(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """`staging` for all processes: the first makes and renames the folder, all may write into it.

    A failure of any process is one of all, and leaves nothing.
    """
    with ExitStack() as stack:
        with agreed():
            mine = stack.enter_context(staging(target, overwrite)) if distributed.rank() == 0 else Path()
        folder = distributed.broadcast(mine)
        with agreed():
            yield folder
    distributed.barrier()
