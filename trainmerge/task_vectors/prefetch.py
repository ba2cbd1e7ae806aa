"""Base and task vectors for a device that does not hold them: one parameter's at a time, the next on its way.

They stay in mapped files. A thread copies the next parameter's to pinned memory and on to the device, on a
stream of its own, while the present one's are used; so the device holds two parameters' at most (and with
Triton's kernels those that wait for a launch, `kernels.calls`). Which one is next is what came next in the
last pass: a backward's order is known only by having seen it.

On a CPU nothing is copied: the passes read the mapped files themselves.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from trainmerge.task_vectors.delta import Delta

Move = Callable[[Delta], Delta]


class Prefetch:
    """Moves deltas, and the next one ahead of time.

    Args:
        move: Brings one delta to where it is used; runs in a thread.
        arrive: Called with what was moved, in the thread that will use it, before it is used.
    """

    def __init__(self, move: Move, arrive: Callable[[Delta], None] = lambda _: None) -> None:
        self._move, self._arrive = move, arrive
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: dict[str, str] = {}  # what followed a parameter in the last pass
        self._last = ""
        self._coming: tuple[Mapping[str, Delta], str, Future[Delta]] | None = None

    def take(self, deltas: Mapping[str, Delta], name: str) -> Delta:
        """One parameter's delta, moved; the one that is expected next sets off."""
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
            moved = coming[2].result()  # also if it is of no use: never two on their way
            if coming[0] is deltas and coming[1] == name:
                return moved
            del moved
        return self._thread.submit(self._move, deltas[name]).result()


def prefetch_to(device: torch.device) -> Prefetch | None:
    """For a GPU, through pinned memory and a stream of its own; none for a CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def move(delta: Delta) -> Delta:
        with torch.cuda.stream(stream):
            moved = each_tensor(delta, lambda part: part.pin_memory().to(device, non_blocking=True))
            stream.synchronize()  # in the thread: the pinned copies may go, and the next pass may read
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
    return Delta(do(delta.base), tuple(terms))
