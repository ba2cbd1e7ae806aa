"""The share of each expert's effect that a merge recovers, on held-out unlabeled examples.

Legend: `B` examples, `K` experts, `G` coefficient groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from trainmerge.data.batch import Batch, Outputs
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.calibration_loss import batches
from trainmerge.fitting.prepare import FitInputs, record_experts
from trainmerge.model.resident import Resident
from trainmerge.model.teachers import Record
from trainmerge.objectives import Alignment, Objective, TotalVariation
from trainmerge.system import distributed

EXAMPLES = 24  # of each expert: more cost time and hardly change the order of merges
TOGETHER = 4  # times a step's batch: no activation is kept for a backward


def judge_of(objective: Objective) -> Objective:
    """A loss that is 0 at each expert, for a fit's objective: how far outputs are apart, or the fit's own.

    Entropy itself judges nothing: a merge can be sure and wrong. And the mean of a divergence is that of a
    few examples on which the merge is sure and wrong; of few examples, total variation orders merges better.
    """
    return TotalVariation() if objective.needs_logits else objective


def mean_share(shares: Sequence[float], weights: Sequence[float]) -> float:
    """The mean of the experts' recovered shares, K numbers, by their tasks' weights; none: equal ones."""
    weights = weights or [1.0] * len(shares)
    return sum(w * r for w, r in zip(weights, shares, strict=True) if w) / sum(weights)


@dataclass(frozen=True)
class HeldOutJudge:
    """Judges the coefficients of a model by the held-out examples: r_k = 1 - L_k(merge) / L_k(base).

    1 is the expert itself, 0 the base, and below 0 is worse than the base. L_k is `judge_of`'s loss to expert
    k's own outputs.
    """

    resident: Resident
    objective: Objective
    data: Calibration
    records: list[Record]

    @staticmethod
    def of(
        given: FitInputs, resident: Resident, objective: Objective, limit: int | None = EXAMPLES
    ) -> "HeldOutJudge":
        """For a fit's inputs and its model, with the first `limit` examples of each expert.

        The experts' outputs are recorded once, in the workspace.
        """
        return HeldOutJudge.on(given.data.held_out_part(limit), given, resident, objective)

    @staticmethod
    def on(data: Calibration, given: FitInputs, resident: Resident, objective: Objective) -> "HeldOutJudge":
        """The same with all examples of `data`."""
        judge, data = judge_of(objective), data.with_examples(data.examples)
        if not judge.couples:
            data.batch_size *= TOGETHER
        records = record_experts(replace(given, asks=judge.asks, data=data), resident)
        return HeldOutJudge(resident, judge, data, records)

    @cached_property
    def base_losses(self) -> Tensor:
        """[K], float64, of the base."""
        with self.resident.merged.uniform(torch.zeros(len(self.records)), everywhere=True):
            return self._losses()

    def recovered(self) -> Tensor:
        """r [K], float64, at the model's current coefficients; -inf where a loss is not a number."""
        self.resident.merged.materialise()
        shares = 1 - self._losses() / self.base_losses.clamp_min(torch.finfo(torch.float32).tiny)
        return shares.nan_to_num(nan=-math.inf, neginf=-math.inf)

    @torch.no_grad()
    def _losses(self) -> Tensor:
        """Mean loss per expert, [K]; several processes share every batch."""
        total = torch.zeros(len(self.records), dtype=torch.float64, device=self.resident.device)
        for batch in batches(self.resident, self.data):
            told = self.records[batch.expert].of(batch.ids, self.resident.device)
            outputs = self.resident(batch, self.objective.asks.layers)
            losses = self._apart(outputs, batch._replace(teacher=told)).double()
            if batch.share:
                total[batch.expert] += losses.sum() / len(self.data.examples[batch.expert])
        return distributed.all_reduce(total).cpu()

    def _apart(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The loss of each example, [B]; a regression's numbers have no probabilities, but a distance."""
        numbers = outputs.kind == "values" and self.objective.needs_predictions
        return (Alignment() if numbers else self.objective)(outputs, batch)
