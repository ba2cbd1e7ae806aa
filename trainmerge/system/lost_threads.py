"""Threads that die of a full memory before they begin: without this, whoever starts one waits for ever."""

import mmap
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ROOM = 16 << 20  # bytes: the stack of one thread, and some
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
    before, main, lost = sys.unraisablehook, threading.main_thread().ident or 0, []

    def hook(found: Any) -> None:
        if issubclass(found.exc_type, MemoryError) and (found.err_msg or "").startswith(DIED):
            lost.append(True)
            signal.pthread_kill(main, signal.SIGINT)  # a real signal: the main thread waits for a lock
        else:
            before(found)

    sys.unraisablehook = hook
    try:
        yield
    except KeyboardInterrupt as stopped:
        if lost:
            raise MemoryError("a thread could not begin") from stopped
        raise
    finally:
        sys.unraisablehook = before
