"""The link from host memory to a device, over which base and task vectors are sent.

A processor that reads host memory has none. On a GPU a thread copies them on a stream of its own, so that
copies overlap with the kernels and with forwards and backwards. Events order the two streams: the thread that
computes waits for no copy.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.slabs import LINE, Slabs, copy_into

Arrival = Callable[[], Delta]  # called before each use of a copy, in the thread that uses it, and gives it


class Link(Protocol):
    """How one device gets deltas."""

    def holder(self, total: int) -> Callable[[Delta], Delta]:
        """Makes copies in host memory from which `send` is fast, of so many bytes together."""

    def send(self, delta: Delta) -> Arrival:
        """Begin a copy to the device; called in the thread of `submit`."""

    def leave(self) -> None:
        """Copies were dropped, whose memory later ones take; called in the thread that used them."""

    def submit(self, job: Callable[[], Arrival]) -> Future[Arrival]:
        """Run this after the earlier jobs, in a thread."""


class CudaLink:
    """A GPU's link: pinned memory, a thread and a stream of its own.

    The thread copies a delta into pinned memory while the one before crosses. This thread alone waits: for
    the copy before the last one, so that at most two deltas are pinned on their way, and for the last use of
    dropped copies, so that a program that is ahead of its GPU takes no more of it than the buffer.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="link")
        self._crossing: deque[torch.cuda.Event] = deque()  # after each copy that may be on its way
        self._used = SimpleQueue[torch.cuda.Event]()  # after the last use of dropped copies

    def holder(self, total: int) -> Callable[[Delta], Delta]:
        """Makes copies in few large buffers of pinned memory."""
        slabs = Slabs(total, lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))
        return lambda delta: each_tensor(delta, slabs.copy)

    def send(self, delta: Delta) -> Arrival:
        """Begin a copy to the GPU, through pinned memory unless the delta is in it."""
        while not self._used.empty():
            self._used.get().synchronize()
        while len(self._crossing) > 1:
            self._crossing.popleft().synchronize()
        with torch.cuda.stream(self._stream):
            # a pinned tensor pins to itself; torch reuses a pinned copy's memory when it has crossed
            sent = each_tensor(delta, lambda part: part.pin_memory().to(self._device, non_blocking=True))
            there = self._stream.record_event()
        self._crossing.append(there)
        return partial(self._arrive, sent, there)

    def _arrive(self, sent: Delta, there: torch.cuda.Event) -> Delta:
        """The copy: the current stream waits for it, and its memory is not reused before its last use."""
        user = torch.cuda.current_stream(self._device)
        user.wait_event(there)
        for part in tensors_of(sent):
            part.record_stream(user)
        return sent

    def leave(self) -> None:
        """Later copies wait for what the current stream was given so far."""
        self._used.put(torch.cuda.current_stream(self._device).record_event())

    def submit(self, job: Callable[[], Arrival]) -> Future[Arrival]:
        """Run this after the earlier jobs."""
        return self._thread.submit(job)


def link_to(device: torch.device) -> Link | None:
    """The link of a GPU; None for a processor."""
    return CudaLink(device) if device.type == "cuda" else None


def each_tensor(delta: Delta, do: Callable[[Tensor], Tensor]) -> Delta:
    """The same delta with each of its tensors replaced."""
    terms: list[Any] = [
        type(term)._make(do(part) if isinstance(part, Tensor) else part for part in term)
        for term in delta.terms
    ]
    return Delta(do(delta.base), tuple(terms), delta.role)


def tensors_of(delta: Delta) -> Iterator[Tensor]:
    """The base, and the tensors of all terms."""
    yield delta.base
    for term in delta.terms:
        yield from (part for part in term if isinstance(part, Tensor))


def copied(delta: Delta) -> Delta:
    """The same delta in memory of this process, from which every pass computes the same bits."""
    return each_tensor(delta, _copied)


def _copied(part: Tensor) -> Tensor:
    """A copy that begins as many bytes after a cache line: products may depend on that."""
    if not part.is_contiguous():
        return part.clone()
    return copy_into(torch.empty(part.nbytes + LINE, dtype=torch.uint8), part)
