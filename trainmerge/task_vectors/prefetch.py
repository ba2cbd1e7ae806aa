"""Prefetch base and task vectors to a device, one parameter ahead.

They stay in mapped files. While one parameter is processed, a thread copies the next one's to pinned memory
and to the device, on its own stream. So the device stores at most two parameters' (with Triton's kernels,
plus those queued for a launch, `kernels.calls`). The next parameter is predicted from the order of the last
pass, because the order of a backward is not known in advance.

On a CPU nothing is copied: the passes read the mapped files directly.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from trainmerge.task_vectors.delta import Delta

Move = Callable[[Delta], Delta]


class Prefetch:
    """Moves deltas to a device, and prefetches the next one.

    Args:
        move: Moves one delta to the device; runs in a thread.
        arrive: Called with the moved delta, in the consuming thread, before its use.
    """

    def __init__(self, move: Move, arrive: Callable[[Delta], None] = lambda _: None) -> None:
        self._move, self._arrive = move, arrive
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: dict[str, str] = {}  # each parameter's successor in the last pass
        self._last = ""
        self._coming: tuple[Mapping[str, Delta], str, Future[Delta]] | None = None

    def take(self, deltas: Mapping[str, Delta], name: str) -> Delta:
        """One parameter's moved delta; starts moving the expected next one."""
        delta = self._arrived(deltas, name)
        self._next[self._last], self._last = name, name
        following = self._next.get(name, name)
        if following != name and following in deltas:
            self._coming = (deltas, following, self._thread.submit(self._move, deltas[following]))
        self._arrive(delta)
        return delta

    def _arrived(self, deltas: Mapping[str, Delta], name: str) -> Delta:
        coming, self._coming = self._coming, None
        if coming is not None:
            moved = coming[2].result()  # also if it is not the wanted one: at most one copy in flight
            if coming[0] is deltas and coming[1] == name:
                return moved
            del moved
        return self._thread.submit(self._move, deltas[name]).result()


def prefetch_to(device: torch.device) -> Prefetch | None:
    """A prefetcher for a GPU, with pinned memory and its own stream; None for a CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def move(delta: Delta) -> Delta:
        with torch.cuda.stream(stream):
            moved = each_tensor(delta, lambda part: part.pin_memory().to(device, non_blocking=True))
            stream.synchronize()  # then the pinned copies can be freed, and the next pass may read
        return moved

    def arrive(delta: Delta) -> None:
        user = torch.cuda.current_stream(device)
        for part in (delta.base, *(part for term in delta.terms for part in term)):
            if isinstance(part, Tensor):
                part.record_stream(user)

    return Prefetch(move, arrive)


def each_tensor(delta: Delta, do: Callable[[Tensor], Tensor]) -> Delta:
    """The same delta with each of its tensors replaced."""
    terms: list[Any] = [
        type(term)._make(do(part) if isinstance(part, Tensor) else part for part in term)
        for term in delta.terms
    ]
    return Delta(do(delta.base), tuple(terms), delta.role)
