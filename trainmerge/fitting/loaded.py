"""A fit's model in memory, with the experts' records or the rounds that record them.

Legend: `K` experts.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainmerge.data.batch import Batch, Step
from trainmerge.fitting.on_policy import OnPolicy
from trainmerge.fitting.on_policy_rounds import Rounds
from trainmerge.fitting.prepare import FitInputs, prepare
from trainmerge.model.resident import Resident
from trainmerge.model.teachers import Record
from trainmerge.system import distributed


@dataclass(frozen=True)
class Loaded:
    """The merged model, and where the experts' outputs on a batch are recorded.

    Args:
        resident: The merged model.
        teachers: K records on the calibration examples, if the objective needs them.
        rounds: The texts that the merge writes, and the experts' records on them; None without them.
        start: A preset's measured coefficients, expandable to [K, G]; None without one.
    """

    resident: Resident
    teachers: list[Record]
    rounds: Rounds | None
    start: Tensor | None

    def rewritten(self, step: Step, at: int) -> Step:
        """The step's batches, on policy with the round's texts of the same examples."""
        return self.rounds.rewritten(step, at) if self.rounds else step

    def with_teacher(self, batch: Batch) -> Batch:
        """The batch with its expert's recorded outputs, if there are records."""
        records: Sequence[Record] = self.rounds.records if self.rounds else self.teachers
        if not records:
            return batch
        return batch._replace(teacher=records[batch.expert].of(batch.ids, self.resident.device))


def load_fit(
    given: FitInputs,
    on_policy: OnPolicy | None,
    description: str,
    device: torch.device | str,
    precision: Callable[[], AbstractContextManager[Any]],
) -> Loaded:
    """Prepare a fit's model; on policy, records come with the rounds.

    `description` is what the fit depends on, as JSON, in the first process.
    """
    made = prepare(given if on_policy is None else given.without_records(), device, precision)
    rounds = (
        None
        if on_policy is None
        else Rounds(on_policy, given, made.resident, distributed.broadcast(description))
    )
    return Loaded(made.resident, made.teachers, rounds, made.start)
