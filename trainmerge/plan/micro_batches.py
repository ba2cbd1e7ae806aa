"""How a step is split into backwards: less memory for more passes over the task vectors; same gradient.

Legend: `B` examples of one expert and step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from trainmerge.data.batch import Batch
from trainmerge.data.example_rows import split_rows
from trainmerge.system.ranges import check_fields, check_option


@dataclass(frozen=True)
class StepSchedule:
    """How a step is split, which determines its memory.

    Args:
        tasks: Tasks whose forwards share one backward; each backward reads the task vectors once.
        examples: Examples per task and forward; 0 is all. With fewer, a task has several backwards.
        recompute: Activation checkpointing: store only the blocks' inputs, and recompute each block in the
            backward.
        keep: Accumulate the weight gradients over a step's backwards, so that the task vectors are read once
            per step, for the memory of one more model.
    """

    tasks: int = 1
    examples: int = 0
    recompute: bool = False
    keep: bool = False

    def __post_init__(self) -> None:
        check_option("tasks_per_backward", self.tasks, int, "[1, inf)")
        check_option("keep_gradients", self.keep, bool)
        check_fields(self, examples="[0, inf)")

    def __str__(self) -> str:
        parts = [f"{self.tasks} task{'s' * (self.tasks > 1)} per backward"]
        parts += [f"{self.examples} example{'s' * (self.examples > 1)} per forward"] if self.examples else []
        parts += ["blocks recomputed"] * self.recompute + ["gradients accumulated"] * self.keep
        return ", ".join(parts)


class OpenSchedule(NamedTuple):
    """What of a schedule is set, and what the plan of a step may choose: None.

    With `least` in place of a plan, all that is not set is what needs the least memory.
    """

    tasks: int | None = None
    keep: bool | None = None

    @classmethod
    def of(
        cls, schedule: Literal["auto", "least"], tasks: int | None, keep: bool | None, separate: bool
    ) -> "OpenSchedule":
        """What the settings of a fit leave open; `least` leaves nothing.

        `separate`: an aggregation needs each expert's own gradient.

        Raises:
            ValueError: a setting is out of range, or they exclude each other.
        """
        check_option("model.schedule", schedule, Literal["auto", "least"])
        if keep and separate:
            raise ValueError(
                "keep_gradients sums the gradients that `combine` needs separately: set only one of them"
            )
        asked = cls(tasks, keep)
        least = asked.least  # its own checks
        return asked if schedule == "auto" else cls(least.tasks, least.keep)

    @property
    def least(self) -> StepSchedule:
        """The schedule of least memory with what is set.

        Raises:
            ValueError: what is set is out of range.
        """
        return StepSchedule(
            1 if self.tasks is None else self.tasks, keep=False if self.keep is None else self.keep
        )


def rounds(step: Sequence[Batch], schedule: StepSchedule) -> Iterator[list[Batch]]:
    """The batches, or parts of them, whose forwards share a backward; two parts of one task never do.

    Raises:
        ValueError: a batch to split has an input whose rows cannot be assigned to examples (`split_rows`).
    """
    if schedule.examples:
        for batch in step:
            for part in _parts(batch, schedule.examples):
                yield [part]
    else:
        for first in range(0, len(step), schedule.tasks):
            yield list(step[first : first + schedule.tasks])


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    count = len(batch.ids)
    if size >= count:
        yield batch
        return
    parts = split_rows(batch.inputs, count, batch.rows, size)
    for first, inputs in zip(range(0, count, size), parts, strict=True):
        own = slice(first, first + size)
        ids = batch.ids[own]
        rows = {name: counts[own] for name, counts in batch.rows.items()}
        share = batch.share * len(ids) / count
        yield batch._replace(inputs=inputs, mask=batch.mask[own], ids=ids, share=share, rows=rows)


def smaller_schedules(schedule: StepSchedule, examples: int, separable: bool) -> Iterator[StepSchedule]:
    """`schedule`, then others in order of decreasing memory.

    Without accumulated gradients, one task per backward, blocks recomputed, fewer examples.

    Args:
        schedule: The first one.
        examples: B.
        separable: Whether an example's loss does not depend on the others of its batch, so that a batch may
            be split.
    """
    yield schedule
    if schedule.keep:
        yield replace(schedule, keep=False)
    if schedule.tasks > 1:
        yield StepSchedule(1, schedule.examples, schedule.recompute)
    if not schedule.recompute:
        yield StepSchedule(1, schedule.examples, recompute=True)
    size = (schedule.examples or examples) // 2 if separable else 0
    while size:
        yield StepSchedule(1, size, recompute=True)
        size //= 2
