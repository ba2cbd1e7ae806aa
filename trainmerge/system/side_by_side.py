"""Independent pieces of work on a CPU, each on one thread: small matrices fill several cores better so."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import TypeVar

import torch

from trainmerge.system.thread_state import thread_state

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # items per thread between two waits for the slowest


def side_by_side(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results in the order of the items; each of torch's threads takes items of its own.

    Within `work` torch computes with one thread, so results do not depend on the number of threads. Between
    two results no thread is at work. `work` must not change what its calls share.

    >>> list(side_by_side(lambda n: torch.get_num_threads() * n, [3, 4, 5]))
    [3, 4, 5]
    """
    threads, source = torch.get_num_threads(), iter(items)
    while group := list(islice(source, AHEAD * threads)):
        yield from _done(work, group, threads)


def _done(work: Callable[[T], R], group: Sequence[T], threads: int) -> list[R]:
    if threads == 1:
        return [work(item) for item in group]
    torch.set_num_threads(1)  # also that of the pool's new threads
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(partial(_alike, work, thread_state()), group))
    finally:
        torch.set_num_threads(threads)


def _alike(work: Callable[[T], R], enter: Callable[[ExitStack], None], item: T) -> R:
    """`work` in another thread's modes."""
    with ExitStack() as stack:
        enter(stack)
        return work(item)
