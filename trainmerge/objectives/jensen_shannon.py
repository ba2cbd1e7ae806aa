"""The generalised Jensen-Shannon divergence between the merge's and the expert's predictions.

Legend: `B` examples, `R` rows, `V` classes or vocabulary, `m` recorded ones.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from trainmerge.data.batch import Asks, Batch, Outputs, Predictions
from trainmerge.objectives.base import Objective
from trainmerge.objectives.rows import counted, example_mean, expert_predictions, reduced
from trainmerge.system.ranges import check_fields

ELEMENTS = 1 << 22  # logits at a time; the backward computes their divergence again
LEAST = -1e30  # in place of log 0, whose gradient is NaN


@dataclass(frozen=True)
class JensenShannon(Objective):
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
    def asks(self) -> Asks:
        return Asks(self.temperature)

    @property
    @override
    def needs_predictions(self) -> bool:
        return True

    @override
    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Loss per example, [B]."""
        told, logits = expert_predictions(batch), outputs.logits.flatten(0, -2)
        if outputs.kind == "tokens":
            return example_mean(self._rows(told, logits[counted(batch.mask)]), batch.mask)
        if outputs.kind == "spans":  # recorded as wide as the longest example
            told = told._replace(log_p=told.log_p[:, : logits.shape[-1]])
        return reduced(self._rows(told, logits), outputs.kind, len(batch.ids))

    def _rows(self, told: Predictions, logits: Tensor) -> Tensor:
        """The divergence of each row, [R]: some at a time, so that one copy of the logits is kept."""
        size = max(1, ELEMENTS // logits.shape[-1])
        parts = [slice(first, first + size) for first in range(0, len(logits), size)]
        given = (Predictions(*(None if t is None else t[part] for t in told)) for part in parts)  # type: ignore[arg-type]
        found = [
            checkpoint(self._divergence, logits[part], own, use_reentrant=False)
            for part, own in zip(parts, given, strict=True)
        ]
        return torch.cat(found) if found else logits.new_zeros(0, dtype=torch.float32)

    def _divergence(self, logits: Tensor, told: Predictions) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        log_p, log_q = (cells.clamp_min(LEAST) for cells in _cells(told, wide.log_softmax(-1)))
        p, q = log_p.exp(), log_q.exp()
        if self.beta == 0:
            return (p * (log_p - log_q)).sum(-1)
        if self.beta == 1:
            return (q * (log_q - log_p)).sum(-1)
        log_m = torch.logaddexp(math.log(self.beta) + log_p, math.log1p(-self.beta) + log_q)
        return (self.beta * p * (log_p - log_m) + (1 - self.beta) * q * (log_q - log_m)).sum(-1)


def _cells(told: Predictions, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both: of every class [R, V], or of the recorded ones and the rest [R, m + 1]."""
    if told.tokens is None:
        return told.log_p, log_q
    assert told.tail is not None
    places = told.tokens.long()
    rest = log_q.scatter(-1, places, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([told.log_p, told.tail[:, None]], -1), torch.cat([log_q.gather(-1, places), rest], -1)
