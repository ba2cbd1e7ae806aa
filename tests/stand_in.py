"""A stand-in for a device behind a link: copies in this process's memory, counted and throttled."""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.link import Arrival, copied, each_tensor
from trainmerge.task_vectors.slabs import Slabs


class CountedLink:
    """Counts what crosses it, and what of that is alive.

    Args:
        rate: Bytes per second; 0 is as fast as memory.
    """

    def __init__(self, rate: float = 0.0) -> None:
        self.rate = rate
        self.sends: Counter[int] = Counter()  # address of a delta's base in its file -> how often it was sent
        self.bytes = self.alive = self.highest = self.pinned = self.arrivals = self.left = 0
        self.threads: set[str] = set()
        self._origins: dict[int, int] = {}  # address of a held copy -> that in the file
        self._free, self._lock = 0.0, threading.RLock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stand-in")

    def holder(self, total: int) -> Callable[[Delta], Delta]:
        slabs = Slabs(total, self._pin)

        def hold(delta: Delta) -> Delta:
            held = each_tensor(delta, slabs.copy)
            self._origins[held.base.data_ptr()] = delta.base.data_ptr()
            return held

        return hold

    def _pin(self, size: int) -> Tensor:
        """A buffer, rounded up as torch's pinned allocator does."""
        self.pinned += 1 << (size - 1).bit_length()
        return torch.empty(size, dtype=torch.uint8)

    def send(self, delta: Delta) -> Arrival:
        began = time.perf_counter()
        self.threads.add(threading.current_thread().name)
        address = delta.base.data_ptr()
        self.sends[self._origins.get(address, address)] += 1
        self.bytes += delta.nbytes
        sent = copied(delta)
        each_tensor(sent, self._enter)
        self._wait(began, delta.nbytes)
        return partial(self._arrive, sent)

    def _arrive(self, sent: Delta) -> Delta:
        self.arrivals += 1
        return sent

    def leave(self) -> None:
        self.left += 1

    def submit(self, job: Callable[[], Arrival]) -> Future[Arrival]:
        return self._thread.submit(job)

    def restart(self) -> None:
        """Count from here."""
        self.sends.clear()
        self.bytes = 0

    def _enter(self, part: Tensor) -> Tensor:
        size = part.nbytes
        with self._lock:
            self.alive += size
            self.highest = max(self.highest, self.alive)
        weakref.finalize(part, self._leave, size)
        return part

    def _leave(self, size: int) -> None:
        with self._lock:
            self.alive -= size

    def _wait(self, began: float, size: int) -> None:
        """Sleep until a link of this rate would be done with everything so far."""
        if self.rate:
            self._free = max(self._free, began) + size / self.rate
            if (left := self._free - time.perf_counter()) > 1e-3:  # a sleep is no more exact
                time.sleep(left)


def behind(link: CountedLink) -> Callable[[torch.device], CountedLink]:
    """In place of `link_to`: every device is behind this link."""
    return lambda _: link
