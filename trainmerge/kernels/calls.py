"""Calls of the two passes, and their gathering where a launch takes any number of them.

Legend: `K` experts, `C` chunks of one parameter, `*S` parameter shape.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from trainmerge.kernels.terms import Term

LAUNCH = 256 << 20  # bytes, which a GPU reads in a tenth of a millisecond: a launch may cost little of that


class Merge(NamedTuple):
    """Write `out` = base + sum_k coefficients[k, chunk] * tau_k."""

    out: Tensor  # [*S]
    base: Tensor  # [*S]
    terms: Sequence[Term]  # K
    coefficients: Tensor  # [K, C]


class Product(NamedTuple):
    """Find <grad, tau_k> per chunk, [K, C]."""

    grad: Tensor  # [*S]
    base: Tensor  # [*S]
    terms: Sequence[Term]  # K
    chunks: int


Call = TypeVar("Call")


class Gathered(Generic[Call]):
    """Calls that wait for others until they are `LAUNCH` bytes together; their tensors stay alive until then.

    Args:
        run: Runs a list of them.
    """

    def __init__(self, run: Callable[[Sequence[Call]], None]) -> None:
        self._run = run
        self._waiting: list[Call] = []
        self._bytes = 0

    def add(self, call: Call, size: int) -> None:
        """One more call, of `size` bytes; one of 0 runs at once, with those before it."""
        self._waiting.append(call)
        self._bytes += size
        if not size or self._bytes >= LAUNCH:
            self.flush()

    def flush(self) -> None:
        """Run what waits."""
        calls, self._waiting, self._bytes = self._waiting, [], 0
        if calls:
            self._run(calls)
