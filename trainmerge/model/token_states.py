"""The inputs of some modules in forward passes: a few tokens of every text, without padding.

Legend: `B` texts, `T` tokens, `R` states, `H` hidden size.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainmerge.model.hooks import hooked

TOKENS = 4096  # states per expert and module


def evenly_spaced(mask: Tensor, most: int) -> Tensor:
    """At most so many of the True positions of each row, evenly spaced; as positions of the flat mask.

    >>> evenly_spaced(torch.tensor([[True, True, True, False], [True, False, False, False]]), 2).tolist()
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
def keeping(
    modules: Mapping[str, nn.Module], kept: Mapping[str, list[Tensor]], chosen: Tensor
) -> Iterator[None]:
    """In this context, keep the inputs of these modules at the `chosen` positions of the flat batch."""

    def read(states: list[Tensor], _: nn.Module, given: tuple[Any, ...]) -> None:
        rows: Tensor = given[0]
        states.append(rows.flatten(0, -2)[chosen].detach().clone())

    with hooked(own.register_forward_pre_hook(partial(read, kept[name])) for name, own in modules.items()):
        yield
