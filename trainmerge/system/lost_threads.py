"""Threads that die of a full memory before they begin: without this, whoever starts one waits for ever."""

import mmap
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ROOM = 16 << 20  # bytes: the stack of one thread, and some
AGAIN = 0.05  # seconds between signals
WOKEN_BY = signal.SIGUSR2  # not SIGINT, which background jobs ignore
DIED = "Exception ignored in thread started by"  # the interpreter's words; the new thread says them


def check_room() -> None:
    """Refuse to begin where C libraries would end the process without a word.

    Raises:
        MemoryError: there is no room for one thread.
    """
    try:
        mmap.mmap(-1, ROOM).close()
    except OSError as error:
        raise MemoryError(f"less than {ROOM >> 20} MiB of address space are left") from error


@contextmanager
def lost_threads() -> Iterator[None]:
    """Raise MemoryError in the main thread if another one finds no memory for its first line.

    `threading.Thread.start` waits without a limit until the new thread has begun, in datasets too.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield
        return
    hook_before, main = sys.unraisablehook, threading.main_thread().ident or 0
    over = False

    def hook(found: Any) -> None:
        if not issubclass(found.exc_type, MemoryError) or not (found.err_msg or "").startswith(DIED):
            hook_before(found)
            return
        while not over:  # a signal just before the main thread's wait for a lock would not end that wait
            signal.pthread_kill(main, WOKEN_BY)
            time.sleep(AGAIN)

    def wake(*_: object) -> None:
        nonlocal over
        if not over:
            over = True
            raise MemoryError("a thread could not begin")

    handler_before = signal.signal(WOKEN_BY, wake)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        over = True
        sys.unraisablehook = hook_before
        signal.signal(WOKEN_BY, handler_before)
