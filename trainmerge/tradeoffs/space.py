"""What the numbers of a search mean: coefficients, and with them one density per expert.

Legend: `K` experts, `G` coefficient groups, `n` numbers of a point.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainmerge.preprocess import Magnitudes, Rule
from trainmerge.tradeoffs.cma_es import Tried
from trainmerge.tradeoffs.scales import scaled

Over = Literal["experts", "coefficients"]
LEAST = 0.001  # the smallest density of a search
FEW = 0.1  # that of half of a population's first genomes


class Found(NamedTuple):
    """A scored point and the merge that it means."""

    tried: Tried
    coefficients: Tensor  # [K, G]
    densities: tuple[float, ...] = ()  # K, those of the merge exactly; empty where they are not searched


@dataclass(frozen=True)
class SearchSpace:
    """A point is a matrix: a scale per expert [K, 1] or all coefficients [K, G], and a column of densities.

    Raises:
        ValueError: scales of coefficients that are all zero.
    """

    start: Tensor  # [K, G]
    over: Over
    magnitudes: Magnitudes | None = None  # where densities are searched

    def __post_init__(self) -> None:
        if self.over == "experts" and not self.start.any(dim=1).all():
            raise ValueError(
                "over: experts scales coefficients, but some expert's are all zero: set model.initial"
            )

    def first(self) -> list[float]:
        """The point of the start; nothing is trimmed."""
        own = torch.ones(len(self.start), 1) if self.over == "experts" else self.start
        return self.point(own, 1.0)

    def point(self, values: Tensor, density: float) -> list[float]:
        """Scales [K, 1] or coefficients [K, G], with one density for all experts, as a point [n]."""
        if self.magnitudes is not None:
            values = torch.cat([values, torch.full_like(values[:, :1], density)], dim=1)
        found: list[float] = values.flatten().tolist()
        return found

    def coefficients(self, x: Sequence[float]) -> Tensor:
        """The coefficients of a point, [K, G]."""
        values = self._matrix(x)
        if self.magnitudes is not None:
            values = values[:, :-1]
        return scaled(self.start, values[:, 0]) if self.over == "experts" else values.to(self.start)

    def found(self, tried: Tried) -> Found:
        """A scored point with its merge."""
        trim = self.trim(tried.x)
        return Found(tried, self.coefficients(tried.x), () if trim is None else trim[0])

    def trim(self, x: Sequence[float]) -> tuple[tuple[float, ...], Rule] | None:
        """The densities of a point [K] and the rule of their trim; None where they are not searched.

        A number beyond 0 or 1 is reflected there, so that CMA-ES meets no plateau.
        """
        if self.magnitudes is None:
            return None
        beyond = self._matrix(x)[:, -1].abs() % 2
        return self.magnitudes.trim(torch.minimum(beyond, 2 - beyond).clamp_min(LEAST).tolist())

    def _matrix(self, x: Sequence[float]) -> Tensor:
        return torch.tensor(x, dtype=torch.float64).view(len(self.start), -1)
