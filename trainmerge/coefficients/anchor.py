"""A penalty on the coefficients' distance from their start, or from given values.

Legend: `K` experts, `G` coefficient groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainmerge.system.ranges import check_fields


@dataclass(frozen=True)
class Anchor:
    """weight * mean |c - at|^power over all K x G coefficients.

    With power 1 it is R of Expert Merging (arXiv 2509.25712), whose gradient at the anchor is 0: it has no
    effect before the first step. Fixed coefficients count in the mean.

    Its reference code differs twice: it divides by G instead of K * G (`scale="reference"`), and averages the
    K tasks' losses, which a fit sums. So its gradient is that of a fit over K, and its gamma and its clip of
    1.0 are reached in one of two ways: `Anchor(K * gamma, scale="reference")` with `clip` K, or
    `Expert.weight` 1 / K with `Anchor(gamma, scale="reference")` and `clip` 1.

    Args:
        weight: The paper's gamma.
        at: One number, or one per expert; None is the coefficients' start.
        power: 1 or 2.
        scale: `paper`, the mean; `reference`, K times the mean.
    """

    weight: float = 0.0
    at: float | Sequence[float] | None = None
    power: Literal[1, 2] = 1
    scale: Literal["paper", "reference"] = "paper"

    def __post_init__(self) -> None:
        check_fields(self, weight="[0, inf)")

    def __call__(self, coefficients: Tensor, start: Tensor) -> Tensor:
        """The penalty of coefficients [K, G] that started at `start` [K, G].

        Raises:
            ValueError: `at` has neither one value nor K.
        """
        at = start if self.at is None else torch.as_tensor(self.at).to(start).reshape(-1, 1)
        if len(at) not in (1, len(start)):
            raise ValueError(
                f"anchor.at has {len(at)} values for {len(start)} experts; give one, or one each"
            )
        mean = (coefficients - at).abs().pow(self.power).mean()
        return self.weight * mean * (len(start) if self.scale == "reference" else 1)
