"""Forwards of several tasks that take turns: each runs one unit of the module, then the next task does.

What a unit needs from a link then comes beside all tasks' units before it. Their common backward takes turns
too: a new thread numbers its operations from 0, and a backward runs the highest first, whosever it is. So a
weight's gradient is complete after one unit of each task, not after whole backwards.

Only one thread runs at a time, in a fixed order.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread, current_thread
from typing import TypeVar

from torch import nn

from trainmerge.model.hooks import hooked
from trainmerge.system.thread_state import thread_state

T = TypeVar("T")


class _EndedError(BaseException):
    """In a thread whose result nobody waits for any more."""


class Turns:
    """Threads of which one runs at a time."""

    def __init__(self) -> None:
        self._queue: deque[Thread] = deque()  # the first one has its turn, and alone changes this
        self._gates: dict[Thread, SimpleQueue[None]] = {}
        self._leaving, self._ended = Lock(), False

    def pass_on(self, *_: object) -> None:
        """Let the others run, up to their own calls of this; nothing in a thread that takes no turns."""
        if current_thread() in self._queue:
            self._queue.rotate(-1)
            self._gates[self._queue[0]].put(None)
            self._wait()

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """What the functions return. All end before this does; an error is raised after that."""
        results = [Future[T]() for _ in functions]
        for function, result in zip(functions, results, strict=True):
            job = partial(copy_context().run, self._one, function, result, thread_state())
            self._gates[Thread(target=job, name="turns")] = SimpleQueue()
        threads = [*self._gates]
        self._queue.extend(threads)
        try:
            for thread in threads:
                thread.start()
            self._gates[threads[0]].put(None)
            return [result.result() for result in results]
        finally:
            with self._leaving:
                self._ended = True
            for thread in threads:
                self._gates[thread].put(None)
                if thread.ident is not None:
                    thread.join()

    def _one(
        self, function: Callable[[], T], result: "Future[T]", enter: Callable[[ExitStack], None]
    ) -> None:
        try:
            self._wait()
            with ExitStack() as stack:
                enter(stack)
                found = function()
        except BaseException as error:  # raised where the result is read
            self._leave()
            result.set_exception(error)
        else:
            self._leave()
            result.set_result(found)

    def _wait(self) -> None:
        self._gates[current_thread()].get()
        if self._ended:
            raise _EndedError

    def _leave(self) -> None:
        with self._leaving:
            self._queue.remove(current_thread())
            if self._queue and not self._ended:
                self._gates[self._queue[0]].put(None)


def in_turns(units: Iterable[nn.Module], functions: Sequence[Callable[[], T]]) -> list[T]:
    """What the functions return; each passes on before each of these modules, in the order given."""
    turns = Turns()
    # before other hooks of a unit, which may merge it
    with hooked(unit.register_forward_pre_hook(turns.pass_on, prepend=True) for unit in units):
        return turns.run(functions)
