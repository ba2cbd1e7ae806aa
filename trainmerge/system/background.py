"""Work done by one thread before another asks for its result."""

from collections.abc import Iterator
from queue import Empty, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """`items`, made by another thread, up to `depth` of them ahead of the consumer.

    What they raise is raised here. When this iterator is closed, the thread ends after the item at hand.
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
        except BaseException as error:  # for the other thread to see
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
                made.get(timeout=0.01)  # room for the item at hand
            except Empty:
                thread.join(0.01)
