"""The generalised Jensen-Shannon divergence between the merge's and the expert's predictions.

Legend: `R` rows, `C` cells: classes or vocabulary, or the recorded ones and the rest.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.objectives.between_predictions import BetweenPredictions
from trainmerge.system.ranges import check_fields

LEAST = -1e30  # in place of log 0, whose gradient is NaN


@dataclass(frozen=True)
class JensenShannon(BetweenPredictions):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, expert p and merge q.

    The mean over counted positions. Agarwal et al., On-Policy Distillation of Language Models, ICLR 2024
    (arXiv 2306.13649), equation 1. At the ends it is 0; there the loss is its limit after division by beta or
    1 - beta: the forward KL(p || q) for beta 0, the reverse KL(q || p) for beta 1. The reverse one keeps the
    merge to what the expert finds probable, which suits texts that the merge wrote (`model.on_policy`).

    Args:
        beta: The expert's share of the mixture m.
        temperature: Of both softmaxes.
    """

    beta: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, beta="[0, 1]", temperature="(0, inf)")

    @property
    @override
    def softness(self) -> float:
        return self.temperature

    @override
    def of_cells(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The divergence of each row, [R], from log-probabilities [R, C]."""
        log_p, log_q = log_p.clamp_min(LEAST), log_q.clamp_min(LEAST)
        p, q = log_p.exp(), log_q.exp()
        if self.beta == 0:
            return (p * (log_p - log_q)).sum(-1)
        if self.beta == 1:
            return (q * (log_q - log_p)).sum(-1)
        log_m = torch.logaddexp(math.log(self.beta) + log_p, math.log1p(-self.beta) + log_q)
        return (self.beta * p * (log_p - log_m) + (1 - self.beta) * q * (log_q - log_m)).sum(-1)
