"""The inputs of some modules in forward passes: a few tokens of every text, without padding.

Legend: `B` texts, `T` tokens, `R` states, `H` hidden size.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class States:
    """The inputs of one module that were kept, as rows."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def stacked(self) -> Tensor:
        """All of them, [R, H]."""
        return torch.cat(self.rows)


def spread(mask: Tensor, most: int) -> Tensor:
    """At most so many of the True positions of each row, evenly spaced; as positions of the flat mask.

    >>> spread(torch.tensor([[True, True, True, False], [True, False, False, False]]), 2).tolist()
    [0, 2, 4]
    """
    found = []
    for row, own in enumerate(mask.bool()):
        places = own.nonzero()[:, 0]
        if len(places) > most:
            places = places[torch.linspace(0, len(places) - 1, most).round().long().to(places.device)]
        found.append(places + row * mask.shape[1])
    return torch.cat(found)


@contextmanager
def keeping(modules: Mapping[str, nn.Module], kept: Mapping[str, States], chosen: Tensor) -> Iterator[None]:
    """In this context, keep the inputs of these modules at the `chosen` positions of the flat batch."""

    def read(states: States, _: nn.Module, given: tuple[Any, ...]) -> None:
        rows: Tensor = given[0]
        states.rows.append(rows.flatten(0, -2)[chosen].detach().clone())

    handles = [own.register_forward_pre_hook(partial(read, kept[name])) for name, own in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
