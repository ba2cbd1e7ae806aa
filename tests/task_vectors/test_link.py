"""A GPU's link without a GPU: what its streams and events are told, in order."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.contracts import assert_same_bits
from tests.stand_in import CountedLink
from trainmerge.kernels import ExpertWeight
from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.link import Arrival, CudaLink
from trainmerge.task_vectors.prefetch import Prefetch


class Stream:
    """Tells a log what it is told; its events have numbers."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log, self._events = name, log, 0

    def record_event(self) -> "Event":
        self._events += 1
        event = Event(f"{self.name}{self._events}", self._log)
        self._log.append(f"record {event.name}")
        return event

    def wait_event(self, event: "Event") -> None:
        self._log.append(f"{self.name} waits for {event.name}")


class Event:
    """Of a stream."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def synchronize(self) -> None:
        self._log.append(f"thread waits for {self.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What CUDA is told, of copies within this process."""
    told: list[str] = []
    user = Stream("user", told)

    def pinned(part: Tensor) -> Tensor:
        told.append("pin")
        return part.clone()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("link", told))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: user)
    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: told.append(f"kept for {stream.name}"))
    return told


def delta_of(value: float) -> Delta:
    return Delta(torch.full((2, 3), value), (ExpertWeight(torch.full((2, 3), value + 1)),))


SENT = ["pin", "pin"]  # base and expert
HERE = ["kept for user"] * 2


def test_the_user_waits_on_its_stream_and_the_thread_for_the_copy_before_the_last(log: list[str]) -> None:
    link = CudaLink(torch.device("cpu"))
    arrivals = [link.send(delta_of(i)) for i in range(3)]
    first = [*SENT, "record link1", *SENT, "record link2"]
    assert log == [*first, "thread waits for link1", *SENT, "record link3"]
    log.clear()
    got = arrivals[1]()
    assert log == ["user waits for link2", *HERE]  # no thread waits
    assert_same_bits(got.dense(), delta_of(1).dense())


def test_what_is_sent_after_a_drop_waits_for_the_last_use(log: list[str]) -> None:
    link = CudaLink(torch.device("cpu"))
    link.send(delta_of(0))()
    link.leave()
    log.clear()
    link.send(delta_of(1))
    assert log == ["thread waits for user1", *SENT, "record link2"]
    log.clear()
    link.send(delta_of(2))
    assert "thread waits for user1" not in log


class Ordered(CountedLink):
    """Writes down what is submitted and dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def leave(self) -> None:
        self.told.append("leave")

    def submit(self, job: Callable[[], Arrival]) -> object:  # type: ignore[override]
        self.told.append("send")
        return super().submit(job)


def test_drops_are_told_before_what_takes_their_room() -> None:
    deltas = {name: delta_of(i) for i, name in enumerate("abcde")}
    link = Ordered()
    prefetch, after = Prefetch(deltas, link), {"a": "b", "b": "c", "c": "d", "d": "e"}
    for name in "abcde":
        prefetch.take(name, after)
    # two fit: a and b; c takes the room of a, and so on
    assert link.told == ["send", "send", "leave", "send", "leave", "send", "leave", "send"]
