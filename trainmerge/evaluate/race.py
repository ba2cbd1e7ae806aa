"""The best of several merges by mean accuracy, without scoring the others to the end.

Examples that earlier merges missed come first, so a merge that cannot win any more is known after a part of
its examples. The winner and its scores are those of scoring all merges on everything.

Legend: `N` examples of a task, `V` classes.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trainmerge.evaluate.score_task import probabilities, score_of
from trainmerge.evaluate.subject import Subject, TaskScore
from trainmerge.evaluate.tasks import Task
from trainmerge.system.distributed import world_size

GROUPS = 4  # of examples that earlier merges missed
CLOSE = 1e-9  # means that differ by less may be equal: both are scored to the end


def can_race(tasks: Sequence[Task]) -> bool:
    """Whether these tasks have accuracies of single classes, all of their examples in this process."""
    return world_size() == 1 and all(task.labels and task.kind == "classes" for task in tasks)


class Race:
    """Scores merges on the same tasks; those behind the best so far are left early.

    Args:
        tasks: The tasks whose mean accuracy decides. They pass `can_race`.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.missed = {task.name: torch.zeros(len(task.examples)) for task in tasks}  # by how many merges
        self.best = 0.0
        self.last: tuple[float, list[list[int]]] = 0.0, []  # the last merge's reach, and what it missed

    def expect(self, scores: Mapping[str, TaskScore]) -> None:
        """A merge of this race that is known already: what others have to reach."""
        means = [float(scores[task.name].outcomes[:, 0].mean()) for task in self.tasks]
        self.best = max(self.best, sum(means) / len(means))

    def is_lost(self, reach: float) -> bool:
        """Whether a mean accuracy of at most `reach` cannot be the best."""
        return reach < self.best - CLOSE

    def leave(self, missed: Sequence[Sequence[int]]) -> None:
        """A merge that left an earlier race, by the examples of each task that it missed."""
        for own, numbers in zip(self.missed.values(), missed, strict=True):
            own[list(numbers)] += 1

    def learn_from(self, scores: Mapping[str, TaskScore]) -> None:
        """Which examples a merge outside the race missed."""
        for task in self.tasks:
            self.missed[task.name] += 1 - scores[task.name].outcomes[:, 0]

    def score(self, subject: Subject) -> dict[str, TaskScore] | None:
        """The merge's scores on the tasks; None as soon as its mean accuracy is below the best one's."""
        found: dict[str, dict[int, Tensor]] = {task.name: {} for task in self.tasks}
        missed = {name: own.clone() for name, own in self.missed.items()}
        reach = 1.0  # its mean accuracy if it misses no other example
        for task, i, p in self._in_order(subject):
            found[task.name][i] = p
            miss = int(p.argmax()) != task.labels[i]
            missed[task.name][i] += miss
            reach -= miss / len(task.examples) / len(self.tasks)
            if self.is_lost(reach):
                break
        added = [(missed[name] - own).nonzero().flatten().tolist() for name, own in self.missed.items()]
        self.missed, self.last = missed, (reach, added)
        if self.is_lost(reach):
            return None
        self.best = max(self.best, reach)
        return {task.name: score_of(subject, task, found[task.name]) for task in self.tasks}

    def _in_order(self, subject: Subject) -> Iterator[tuple[Task, int, Tensor]]:
        """Every example once, with its probabilities [V]: those first that most merges missed.

        In `GROUPS` groups and those that no merge missed: more would leave few examples of a task to a batch.
        """
        highest = max((n for own in self.missed.values() for n in own.tolist()), default=0) or 1
        groups = {name: (own / highest * GROUPS).ceil() for name, own in self.missed.items()}
        for group in range(GROUPS, -1, -1):
            for task in self.tasks:
                numbers = (groups[task.name] == group).nonzero().flatten().tolist()
                for i, p in probabilities(subject, task, numbers):
                    yield task, i, p
