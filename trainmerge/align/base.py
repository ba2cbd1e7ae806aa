"""The interface of methods that line an expert up with its base."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trainmerge.align.assignment import assign
from trainmerge.align.pair import Pair
from trainmerge.align.unit_map import UnitMap

LEAST = 1e-6  # relative gain of the inner products, below which nothing is moved


@dataclass(frozen=True)
class Align(ABC):
    """New places, or another gauge, for the units of an expert: its function stays the same."""

    stage: ClassVar[int] = 0  # methods are applied in the order of their stages
    repeated: ClassVar[bool] = True  # whether another method's result may change this one's
    units: ClassVar[str] = ""  # what it puts in other places

    @abstractmethod
    def __call__(self, pair: Pair) -> Mapping[str, UnitMap]:
        """Space -> how to change its units so that they are nearer to the base's; without those that stay."""


def nearest_order(similarity: Tensor) -> tuple[Tensor, float, float]:
    """The order of the expert's units with the largest sum of inner products [base, expert], and two sums.

    They are those of that order and of the units as they are.
    """
    order = assign(-similarity)
    wide = similarity.double()
    return order, float(wide[torch.arange(len(order)), order].sum()), float(wide.diagonal().sum())


def better(found: float, before: float) -> bool:
    """Whether a sum of inner products is larger by more than rounding."""
    return found - before > LEAST * max(abs(found), abs(before))
