"""Second moments and magnitudes of the inputs of layers, read in forward passes.

Legend: `R` rows, `n` inputs of a linear layer.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from typing_extensions import override

from trainmerge.model.hooks import hooked


class InputMean(ABC):
    """The mean of something over all rows that were added."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add these rows [R, n]."""
        self.total = self._added(rows.float())
        self.count += len(rows)

    @abstractmethod
    def _added(self, rows: Tensor) -> Tensor:
        """The total with these rows."""

    def mean(self) -> Tensor:
        """Over the rows so far."""
        assert self.total is not None
        return (self.total / self.count).cpu()


class Moment(InputMean):
    """Of x x^T, [n, n]."""

    @override
    def _added(self, rows: Tensor) -> Tensor:
        return rows.T @ rows if self.total is None else self.total.addmm_(rows.T, rows)


class Magnitude(InputMean):
    """Of |x|, [n]."""

    @override
    def _added(self, rows: Tensor) -> Tensor:
        summed = rows.abs().sum(dim=0)
        return summed if self.total is None else self.total.add_(summed)


class Kept:
    """The rows themselves, one tensor per call."""

    def __init__(self) -> None:
        self.calls: deque[Tensor] = deque()

    def add(self, rows: Tensor) -> None:
        """Keep these rows [R, n]."""
        self.calls.append(rows.clone())


class Shifts:
    """Moments of rows x, and of y - x for the rows y that another model's calls kept, in their order."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._inputs, self._apart = Moment(), Moment()
        self._mixed: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add these rows x [R, n]; the kept ones are let go."""
        x = rows.float()
        apart = self._kept.calls.popleft().float() - x
        self._inputs.add(x)
        self._apart.add(apart)
        self._mixed = apart.T @ x if self._mixed is None else self._mixed.addmm_(apart.T, x)

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of x x^T, (y - x) x^T and (y - x) (y - x)^T, [n, n] each."""
        assert self._mixed is not None
        return self._inputs.mean(), (self._mixed / self._inputs.count).cpu(), self._apart.mean()


class Reads(Protocol):
    """What `watching` gives rows to."""

    def add(self, rows: Tensor) -> None:
        """Take these rows [R, n]."""


@contextmanager
def watching(
    layers: Mapping[str, nn.Module], means: Mapping[str, Reads], mask: Tensor | None
) -> Iterator[None]:
    """Add the layers' inputs in a forward pass, without rows of padding where the shape identifies them."""

    def read(mean: Reads, _: nn.Module, given: tuple[Any, ...]) -> None:
        states: Tensor = given[0]
        padded = mask is not None and states.shape[:-1] == mask.shape
        mean.add(states[mask.bool()] if mask is not None and padded else states.flatten(0, -2))

    with hooked(own.register_forward_pre_hook(partial(read, means[name])) for name, own in layers.items()):
        yield
