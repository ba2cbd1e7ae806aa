"""Second moments and magnitudes of the inputs of layers, read in forward passes.

Legend: `R` rows, `n` inputs of a linear layer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


class Moment:
    """A running sum of x x^T."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add these rows [R, n]."""
        wide = rows.float()
        self.total = wide.T @ wide if self.total is None else self.total.addmm_(wide.T, wide)
        self.count += len(rows)

    def mean(self) -> Tensor:
        """The second moment, [n, n]."""
        assert self.total is not None
        return (self.total / self.count).cpu()


class Magnitude:
    """A running sum of |x|."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Add these rows [R, n]."""
        summed = rows.float().abs().sum(dim=0)
        self.total = summed if self.total is None else self.total.add_(summed)
        self.count += len(rows)

    def mean(self) -> Tensor:
        """Mean |x|, [n]."""
        assert self.total is not None
        return (self.total / self.count).cpu()


@contextmanager
def watching(
    layers: Mapping[str, nn.Module],
    moments: Mapping[str, Moment] | Mapping[str, Magnitude],
    mask: Tensor | None,
) -> Iterator[None]:
    """Add the layers' inputs in a forward pass, without rows of padding where the shape identifies them."""

    def read(moment: Moment | Magnitude, _: nn.Module, given: tuple[Any, ...]) -> None:
        states: Tensor = given[0]
        padded = mask is not None and states.shape[:-1] == mask.shape
        moment.add(states[mask.bool()] if mask is not None and padded else states.flatten(0, -2))

    handles = [
        layer.register_forward_pre_hook(partial(read, moments[name])) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
