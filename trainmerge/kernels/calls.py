"""Calls of the two passes, and a queue that batches them into launches.

Legend: `K` experts, `C` chunks of one parameter, `*S` parameter shape.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from trainmerge.kernels.terms import Term

LAUNCH = 256 << 20  # bytes per launch: a GPU reads them in 0.1 ms, which should exceed the launch overhead


class Merge(NamedTuple):
    """Write `out` = base + sum_k coefficients[k, chunk] * tau_k."""

    out: Tensor  # [*S]
    base: Tensor  # [*S]
    terms: Sequence[Term]  # K
    coefficients: Tensor  # [K, C]


class Product(NamedTuple):
    """Compute <grad, tau_k> per chunk, [K, C]."""

    grad: Tensor  # [*S]
    base: Tensor  # [*S]
    terms: Sequence[Term]  # K
    chunks: int


Call = TypeVar("Call")


class Gathered(Generic[Call]):
    """Queues calls until they have `LAUNCH` bytes together; keeps their tensors alive until then.

    Args:
        run: Runs a list of them.
    """

    def __init__(self, run: Callable[[Sequence[Call]], None]) -> None:
        self._run = run
        self._waiting: list[Call] = []
        self._bytes = 0

    def add(self, call: Call, size: int) -> None:
        """Add a call of `size` bytes; a size of 0 runs it at once, with the queued ones."""
        self._waiting.append(call)
        self._bytes += size
        if not size or self._bytes >= LAUNCH:
            self.flush()

    def flush(self) -> None:
        """Run the queued calls."""
        calls, self._waiting, self._bytes = self._waiting, [], 0
        if calls:
            self._run(calls)
