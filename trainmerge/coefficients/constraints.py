"""The feasible set of the coefficients, and the map from the optimised values to them.

A hard clamp inside the graph has no gradient outside its box, so coefficients there never change again. `Box`
and `Simplex` project after the step instead, so a coefficient at the bound can always return.

Legend: `K` experts, `G` coefficient groups.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.system.ranges import check_fields


@dataclass(frozen=True)
class Constraint(ABC):
    """Coefficients [K, G] = values(raw), and raw = project(raw) after each step."""

    def values(self, raw: Tensor) -> Tensor:
        """Coefficients from the optimised values, both [K, G]; differentiable."""
        return raw

    @abstractmethod
    def start(self, values: Tensor) -> Tensor:
        """The raw tensor that `values` maps to these coefficients, [K, G].

        Raises:
            ValueError: they are outside the set.
        """

    @abstractmethod
    def project(self, raw: Tensor) -> Tensor:
        """The nearest point of the set, [K, G]."""

    def at_bound(self, values: Tensor) -> Tensor:
        """Which coefficients [K, G] are at a bound of the set, as booleans; by default none."""
        return torch.zeros_like(values, dtype=torch.bool)


@dataclass(frozen=True)
class Free(Constraint):
    """No constraint."""

    @override
    def start(self, values: Tensor) -> Tensor:
        return values

    @override
    def project(self, raw: Tensor) -> Tensor:
        return raw


@dataclass(frozen=True)
class Box(Constraint):
    """Values in [low, high], by projection after the step."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, low="[-inf, inf)", high="(-inf, inf]")
        if not self.low < self.high:
            raise ValueError(f"box needs low < high, not [{self.low}, {self.high}]")

    @override
    def start(self, values: Tensor) -> Tensor:
        if bool(((values < self.low) | (values > self.high)).any()):
            raise ValueError(f"initial coefficients are outside the box [{self.low}, {self.high}]")
        return values

    @override
    def project(self, raw: Tensor) -> Tensor:
        return raw.clamp(self.low, self.high)

    @override
    def at_bound(self, values: Tensor) -> Tensor:
        return (values <= self.low) | (values >= self.high)


@dataclass(frozen=True)
class Sigmoid(Constraint):
    """Values in (0, 1) through a sigmoid, as in Expert Merging (arXiv 2509.25712)."""

    @override
    def values(self, raw: Tensor) -> Tensor:
        return raw.sigmoid()

    @override
    def start(self, values: Tensor) -> Tensor:
        if bool(((values <= 0) | (values >= 1)).any()):
            raise ValueError("a sigmoid needs initial coefficients strictly between 0 and 1")
        return values.logit()

    @override
    def project(self, raw: Tensor) -> Tensor:
        return raw

    @override
    def at_bound(self, values: Tensor) -> Tensor:
        """True where the sigmoid's slope is at most a twentieth of its maximum."""
        return values * (1 - values) <= 0.0125


@dataclass(frozen=True)
class Simplex(Constraint):
    """In each group the K coefficients are nonnegative and sum to `total`, by Euclidean projection.

    With `base` they may sum to less, so that the base is a vertex of the convex hull too.
    """

    total: float = 1.0
    base: bool = False

    def __post_init__(self) -> None:
        check_fields(self, total="(0, inf)")

    @override
    def start(self, values: Tensor) -> Tensor:
        if not torch.allclose(self.project(values), values, atol=1e-5):
            bound = "at most " if self.base else ""
            raise ValueError(
                "a simplex needs initial coefficients >= 0 that sum to "
                f"{bound}{self.total:g} over the experts"
            )
        return values

    @override
    def project(self, raw: Tensor) -> Tensor:
        """Sort-and-threshold projection (Duchi et al., ICML 2008, figure 1), one column per group."""
        if self.base:
            inside = raw.clamp(min=0)
            return torch.where(inside.sum(dim=0) <= self.total, inside, Simplex(self.total).project(raw))
        raw = raw - raw.max(dim=0, keepdim=True).values  # the same projection; exact for large values too
        ordered = raw.sort(dim=0, descending=True).values
        rank = torch.arange(1, len(raw) + 1, device=raw.device, dtype=raw.dtype)[:, None]
        shift = (ordered.cumsum(dim=0) - self.total) / rank
        support = (ordered > shift).sum(dim=0, keepdim=True)
        return (raw - shift.gather(0, support - 1)).clamp(min=0)
