"""Work ahead in a background thread."""

from collections.abc import Generator, Iterator
from queue import Empty, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """`items`, produced by another thread, up to `depth` of them ahead of the consumer.

    Their exceptions are raised here. When this iterator is closed, the thread ends after the current item:
    close it, with `contextlib.closing`, or a failure may leave the thread running when the process exits.
    """
    made: Queue[list[T] | BaseException] = Queue(depth)  # one item, or none at the end
    left = Event()

    def make() -> None:
        try:
            for item in items:
                made.put([item])
                if left.is_set():
                    return
            made.put([])
        except BaseException as error:  # raised in the consumer
            made.put(error)

    thread = Thread(target=make, daemon=True)
    thread.start()
    try:
        while got := made.get():
            if isinstance(got, BaseException):
                raise got
            yield got[0]
    finally:
        left.set()
        while thread.is_alive():
            try:
                made.get(timeout=0.01)  # room for the current item
            except Empty:
                thread.join(0.01)
