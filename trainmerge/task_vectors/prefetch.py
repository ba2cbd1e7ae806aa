"""Base and task vectors for a step's passes: sent to a device ahead of their use, or read where they are.

While a pass processes one parameter, the next ones cross the link. The device stores those it holds for good,
and a bounded buffer of those used last: a pass that begins where the last one ended finds them there.
"""

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from typing import Protocol

from trainmerge.system.memory import available
from trainmerge.system.safetensors_file import read_ahead
from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.link import Arrival, Link, copied, tensors_of
from trainmerge.task_vectors.parameter_names import block_of


class Supply(Protocol):
    """One source of deltas for the passes."""

    waits: bool  # whether every pass reads some of them from far away

    def take(self, name: str, after: Mapping[str, str], /) -> Delta:
        """One parameter's delta; `after` is each parameter's expected successor in this pass."""


class Mapped:
    """Deltas for a processor that reads host memory: mapped ones, or copies of these that are made once.

    Of files larger than the memory that is left for their pages, those of the next block are read ahead.

    Args:
        deltas: The deltas.
        held: Those that are copied.
    """

    def __init__(self, deltas: Mapping[str, Delta], held: Collection[str] = ()) -> None:
        self._deltas, self._held = deltas, held
        self._copies: dict[str, Delta] = {}
        self._sizes = {name: delta.nbytes for name, delta in deltas.items() if name not in held}
        room = available()
        exceeds = room is not None and sum(self._sizes.values()) > room
        self._ahead = largest_block(self._sizes) if exceeds else 0
        self.waits = exceeds
        self._asked: set[str] = set()

    def take(self, name: str, after: Mapping[str, str]) -> Delta:
        """One parameter's delta."""
        if name not in self._held:
            if self._ahead:
                self._read_ahead(name, after)
            return self._deltas[name]
        if name not in self._copies:
            self._copies[name] = copied(self._deltas[name])
        return self._copies[name]

    def _read_ahead(self, name: str, after: Mapping[str, str]) -> None:
        """Ask for the pages of the next parameters, once in each pass."""
        self._asked.discard(name)
        for following in coming(name, after, self._sizes, self._ahead, self._held):
            if following not in self._asked:
                self._asked.add(following)
                for part in tensors_of(self._deltas[following]):
                    read_ahead(part)


class Prefetch:
    """Deltas for a device behind a link.

    Args:
        deltas: The deltas, in mapped files.
        link: The device's link.
        on_device: Those that stay on the device from their first use on.
        in_host: Those that stay in host memory from their first use on.
    """

    def __init__(
        self,
        deltas: Mapping[str, Delta],
        link: Link,
        on_device: Collection[str] = (),
        in_host: Collection[str] = (),
    ) -> None:
        self._deltas, self._link = deltas, link
        self._on_device, self._in_host = on_device, in_host
        self._host: dict[str, Delta] = {}
        self._stay: dict[str, Future[Arrival]] = {}
        self._buffer: dict[str, Future[Arrival]] = {}  # the least recently used first
        self._sizes = {name: delta.nbytes for name, delta in deltas.items()}
        self._ahead = largest_block(self._sizes)
        self.waits = not {*on_device}.issuperset(deltas)
        self._hold = link.holder(sum(self._sizes[name] for name in in_host))

    def take(self, name: str, after: Mapping[str, str]) -> Delta:
        """One parameter's delta on the device; the next ones begin to be sent.

        The buffer has at most twice the bytes of the largest block.
        """
        following = coming(name, after, self._sizes, self._ahead, self._stay)
        self._make_room({name, *following} - {*self._on_device})
        sent = self._sent(name)
        for one in following:
            self._sent(one)
        return sent.result()()

    def _make_room(self, needed: Collection[str]) -> None:
        """Drop the least recently used until the needed ones fit."""
        total = sum(self._sizes[name] for name in {*self._buffer, *needed})
        before = len(self._buffer)
        for name in [name for name in self._buffer if name not in needed]:
            if total <= 2 * self._ahead:
                break
            self._buffer.pop(name).cancel()
            total -= self._sizes[name]
        if len(self._buffer) < before:
            self._link.leave()

    def _sent(self, name: str) -> Future[Arrival]:
        """The copy on the device, on its way perhaps; it is the most recently used one."""
        if name in self._on_device:
            if name not in self._stay:
                self._stay[name] = self._submitted(name)
            return self._stay[name]
        sent = self._buffer.pop(name, None) or self._submitted(name)
        self._buffer[name] = sent
        return sent

    def _submitted(self, name: str) -> Future[Arrival]:
        return self._link.submit(lambda: self._link.send(self._source(name)))

    def _source(self, name: str) -> Delta:
        """Where a copy is sent from: a file, or host memory, to which the first use copies it."""
        if name not in self._in_host:
            return self._deltas[name]
        if name not in self._host:
            self._host[name] = self._hold(self._deltas[name])
        return self._host[name]


def coming(
    name: str, after: Mapping[str, str], sizes: Mapping[str, int], left: int, there: Collection[str] = ()
) -> list[str]:
    """The next parameters that are not `there`, up to `left` bytes.

    >>> coming("a", {"a": "b", "b": "c", "c": "d"}, {"a": 3, "b": 1, "c": 5, "d": 2}, 3, there="c")
    ['b', 'd']
    """
    found: list[str] = []
    seen = {name}
    while (name := after.get(name, "")) and name not in seen:
        seen.add(name)
        if name in there:
            continue
        left -= sizes[name]
        if left < 0:
            break
        found.append(name)
    return found


def largest_block(sizes: Mapping[str, int]) -> int:
    """The largest sum of the sizes of one block's parameters: how far ahead of their use they are sent.

    >>> largest_block({"embed.weight": 5, "layers.0.up.weight": 3, "layers.0.down.weight": 4})
    7
    """
    blocks: dict[str, int] = {}
    for name, size in sizes.items():
        blocks[block_of(name)] = blocks.get(block_of(name), 0) + size
    return max(blocks.values(), default=0)


def supply_of(
    deltas: Mapping[str, Delta],
    link: Link | None,
    on_device: Collection[str] = (),
    in_host: Collection[str] = (),
) -> Supply:
    """The deltas of a device with this link, or of a processor, whose device and host memory are one."""
    if link is None:
        return Mapped(deltas, {*on_device, *in_host})
    return Prefetch(deltas, link, frozenset(on_device), frozenset(in_host))
