"""Second moments and magnitudes of the inputs of layers, read in forward passes.

Legend: `R` rows, `n` inputs of a linear layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

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


@contextmanager
def watching(
    layers: Mapping[str, nn.Module], means: Mapping[str, InputMean], mask: Tensor | None
) -> Iterator[None]:
    """Add the layers' inputs in a forward pass, without rows of padding where the shape identifies them."""

    def read(mean: InputMean, _: nn.Module, given: tuple[Any, ...]) -> None:
        states: Tensor = given[0]
        padded = mask is not None and states.shape[:-1] == mask.shape
        mean.add(states[mask.bool()] if mask is not None and padded else states.flatten(0, -2))

    with hooked(own.register_forward_pre_hook(partial(read, means[name])) for name, own in layers.items()):
        yield
