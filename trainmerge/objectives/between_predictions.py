"""What losses between the merge's and the expert's predictions share: rows, parts and means.

Legend: `B` examples, `R` rows, `V` classes or vocabulary, `m` recorded ones, `C` cells: V, or m and the rest.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from trainmerge.data.batch import Asks, Batch, Outputs, Predictions
from trainmerge.objectives.base import Objective
from trainmerge.objectives.rows import counted, example_mean, expert_predictions, reduced

ELEMENTS = 1 << 22  # logits at a time; the backward computes their loss again


@dataclass(frozen=True)
class BetweenPredictions(Objective):
    """The mean over counted positions of a loss between two distributions."""

    @property
    @override
    def asks(self) -> Asks:
        return Asks(self.softness)

    @property
    @override
    def needs_predictions(self) -> bool:
        return True

    @property
    def softness(self) -> float:
        """The temperature of both softmaxes."""
        return 1.0

    @abstractmethod
    def of_cells(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The loss of each row, [R], from log-probabilities of the expert and of the merge, [R, C]."""

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
        """The loss of each row, [R]: some at a time, so that one copy of the logits is kept."""
        size = max(1, ELEMENTS // logits.shape[-1])
        parts = [slice(first, first + size) for first in range(0, len(logits), size)]
        given = (Predictions(*(None if t is None else t[part] for t in told)) for part in parts)  # type: ignore[arg-type]
        found = [
            checkpoint(self._part, logits[part], own, use_reentrant=False)
            for part, own in zip(parts, given, strict=True)
        ]
        return torch.cat(found) if found else logits.new_zeros(0, dtype=torch.float32)

    def _part(self, logits: Tensor, told: Predictions) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.softness
        return self.of_cells(*_cells(told, wide.log_softmax(-1)))


def _cells(told: Predictions, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both: of every class [R, V], or of the recorded ones and the rest [R, m + 1]."""
    if told.tokens is None:
        return told.log_p, log_q
    assert told.tail is not None
    places = told.tokens.long()
    rest = log_q.scatter(-1, places, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([told.log_p, told.tail[:, None]], -1), torch.cat([log_q.gather(-1, places), rest], -1)
