"""The schedule of a step that is fastest within memory, by its plan; all give one gradient up to rounding.

The fewest passes over the task vectors come from one backward for all tasks, which needs their activations,
or from accumulated gradients, which need the memory of one more model. Which is less, and how many task
vectors then fit the device, depends on model, texts and device: the plans say.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from trainmerge.plan.micro_batches import OpenSchedule, StepSchedule, smaller_schedules
from trainmerge.plan.plan import Plan

MARGIN = 1.05  # for libraries' own memory and allocator rounding: 3% over the plan was measured


@dataclass(frozen=True)
class StepTasks:
    """The tasks of a step.

    Args:
        count: Their number.
        examples: Examples of each on a device.
        separable: Whether a batch may be split.
        together: Whether they may share a backward and a sum of gradients.
    """

    count: int
    examples: int
    separable: bool = True
    together: bool = True

    def levels(self, asked: OpenSchedule) -> Iterator[list[StepSchedule]]:
        """Schedules that differ in tasks per backward, then slower ones of less memory, one by one."""
        first, *smaller = smaller_schedules(asked.least, self.examples, self.separable)
        tasks = self.count if asked.tasks is None and self.together else 1
        wide = []
        while tasks > 1:
            wide.append(replace(first, tasks=tasks))
            tasks = -(-tasks // 2)
        yield [*wide, first]
        for schedule in smaller:
            yield [schedule]

    def variants(self, plan: Plan, asked: OpenSchedule) -> list[Plan]:
        """The plan, and the same with accumulated gradients where that is open."""
        if asked.keep is not None or not self.together or plan.backwards == 1:
            return [plan]
        return [plan, replace(plan, schedule=replace(plan.schedule, keep=True))]


def fastest(
    asked: OpenSchedule, tasks: StepTasks, planned: Callable[[StepSchedule], Plan], limit: int
) -> tuple[Plan, bool]:
    """The fastest plan whose step, with a margin, needs at most `limit` bytes; if none does, the smallest.

    A level of recomputed blocks or fewer examples is planned only where the one before does not fit. The
    second result is whether the plan fits.
    """
    for level in tasks.levels(asked):
        plans = [plan for schedule in level for plan in tasks.variants(planned(schedule), asked)]
        if fitting := [plan for plan in plans if fits_in_memory(plan, limit)]:
            return min(fitting, key=lambda plan: (plan.step_seconds, plan.needed)), True
    return plans[0], False


def fits_in_memory(plan: Plan, limit: int) -> bool:
    """Whether a step needs at most `limit` bytes, what `vectors` asks for included."""
    try:
        return MARGIN * plan.needed <= limit
    except ValueError:  # `vectors` names a place without room
        return False
