"""Published rules for coefficients without learning: starting points, or complete merges.

Legend: `K` experts, `G` coefficient groups, `N` texts.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.coefficients.layout import Layout
from trainmerge.system.ranges import check_fields


@dataclass(frozen=True)
class Preset(ABC):
    """Coefficients from a rule."""

    @abstractmethod
    def __call__(self, experts: Sequence[str], layout: Layout) -> Tensor:
        """The coefficients, [K, 1] or [K, G]."""


@dataclass(frozen=True)
class LayerSwap(Preset):
    """One expert's lowest and highest blocks, the other's middle blocks: coefficients 1 and 0.

    Bandarkar et al., ICLR 2025 (arXiv 2410.01335), which swaps the layers of a language expert into a maths
    expert of 32 layers. Blocks are the numbered ones; parameters outside them (embeddings, final norm) are
    the outer expert's.

    Args:
        outer: The expert of the lowest and the highest blocks (the paper's language expert).
        inner: The expert of the middle blocks.
        bottom: Number of lowest blocks.
        top: Number of highest blocks.
        transition: Number of blocks at each border with coefficient 1/2 for both.
    """

    outer: str
    inner: str
    bottom: int = 5
    top: int = 2
    transition: int = 1

    def __post_init__(self) -> None:
        check_fields(self, bottom="[0, inf)", top="[0, inf)", transition="[0, inf)")

    @override
    def __call__(self, experts: Sequence[str], layout: Layout) -> Tensor:
        if unknown := {self.outer, self.inner} - set(experts):
            raise ValueError(f"LayerSwap: no expert {sorted(unknown)}; there are {list(experts)}")
        depth = 1 + max(
            (number for name in layout.groups if (number := _number(name)) is not None), default=-1
        )
        if self.bottom + self.top + 2 * self.transition > depth:
            raise ValueError(f"LayerSwap: {depth} blocks are too few for {self}")
        shares: dict[int, float] = {}  # of the outer expert
        for name, groups in layout.groups.items():
            share = self._outer_share(_number(name), depth)
            if any(shares.setdefault(group, share) != share for group in groups):
                raise ValueError("LayerSwap needs one coefficient per block, or a finer grouping")
        outer = torch.tensor([shares[group] for group in range(len(layout.labels))])
        values = torch.zeros(len(experts), len(layout.labels))
        values[experts.index(self.outer)] = outer
        values[experts.index(self.inner)] += 1 - outer
        return values

    def _outer_share(self, block: int | None, depth: int) -> float:
        if block is None or block < self.bottom or block >= depth - self.top:
            return 1.0
        inner = range(self.bottom + self.transition, depth - self.top - self.transition)
        return 0.0 if block in inner else 0.5


def _number(name: str) -> int | None:
    """The block that a parameter is in: its name's first number."""
    found = re.search(r"\.(\d+)\.", f".{name}")
    return int(found.group(1)) if found else None


@dataclass(frozen=True)
class MetricsWeighted(Preset):
    """Checkpoints of one run, weighted by a metric: w_k = m_k^power, or m_k^-power, normalised to sum to 1.

    Metrics-weighted averaging (arXiv 2504.18580) weights by training loss or step with one exponent. We found
    no exact formula, so this one is ours. Power 0 is the average; a higher one favours the best.

    Args:
        metrics: Expert -> its metric, above 0.
        power: The exponent.
        best: Whether the `lowest` metric is best (a loss) or the `highest` (a step, a score).
    """

    metrics: Mapping[str, float]
    power: float = 1.0
    best: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        check_fields(self, metrics="(0, inf)", power="[0, inf)")

    @override
    def __call__(self, experts: Sequence[str], layout: Layout) -> Tensor:
        if set(self.metrics) != set(experts) or min(self.metrics.values()) <= 0:
            raise ValueError(f"MetricsWeighted needs a metric above 0 for each of {list(experts)}")
        sign = -1 if self.best == "lowest" else 1
        logs = torch.tensor([log(self.metrics[name]) for name in experts], dtype=torch.float64)
        return (sign * self.power * logs).softmax(dim=0).float()[:, None]
