"""One output folder written atomically by several processes under torchrun."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from trainmerge.system import distributed
from trainmerge.system.staging import staging

T = TypeVar("T")


@contextmanager
def agreed() -> Iterator[None]:
    """A section that all processes complete or none: if one fails, the others raise too.

    Raises this process's own exception, or ChildProcessError with the messages of the failed ones.
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


def balanced_share(sizes: Mapping[T, int]) -> list[T]:
    """The share of one process: largest items first, each to the process with the least so far."""
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

    If any process fails, all fail, and the folder is removed.
    """
    with ExitStack() as stack:
        with agreed():
            mine = stack.enter_context(staging(target, overwrite)) if distributed.rank() == 0 else Path()
        folder = distributed.broadcast(mine)
        with agreed():
            yield folder
    distributed.barrier()
