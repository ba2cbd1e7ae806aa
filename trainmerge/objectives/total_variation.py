"""The total variation distance between the merge's and the expert's predictions.

Legend: `R` rows, `C` cells: classes or vocabulary, or the recorded ones and the rest.
"""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from trainmerge.objectives.between_predictions import BetweenPredictions


@dataclass(frozen=True)
class TotalVariation(BetweenPredictions):
    """sum |p - q| / 2, expert p and merge q: how much probability must move, from 0 to 1.

    The mean over counted positions. No example counts for more than 1, however sure the merge is where it is
    wrong; a divergence has no such bound, and a few examples decide its mean. So it judges merges by few
    held-out examples (`trainmerge.fitting.held_out`). To learn from, Wen et al., f-Divergence Minimization
    for Sequence-Level Knowledge Distillation, ACL 2023 (arXiv 2307.15190).
    """

    @override
    def of_cells(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The distance of each row, [R], from log-probabilities [R, C]."""
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
