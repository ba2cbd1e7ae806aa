"""Whether a merged mixture sends tokens to the experts of a layer that each fine-tune would send its own to.

For every task the fine-tune's router and the merge's read the same texts, each in its own model. A token
agrees in a layer if both choose the same set of experts.

Legend: `E` experts of a layer, `T` tokens of a text, `k` experts for each token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainmerge.evaluate.subject import Subject
from trainmerge.evaluate.tasks import Task
from trainmerge.model.resident import Resident
from trainmerge.model.routing import RouterChoice, routers_of, watching_routers
from trainmerge.system.distributed import merge_shares, own_share

TEXTS = 64  # of each task
Chosen = Mapping[str, Tensor]  # router -> sorted experts [T, k] of one text
Shares = Mapping[str, Mapping[str, float]]  # task -> router -> share of tokens


@dataclass(frozen=True)
class Routing:
    """The fine-tunes' choices on their own tasks' texts, to compare merges with."""

    tasks: Sequence[Task]
    own: Mapping[str, Mapping[int, Chosen]]  # task -> number of the text -> what its fine-tune chooses

    def agreement(self, subject: Subject) -> Shares:
        """Task -> router -> the share of tokens for which `subject` chooses the fine-tune's set."""
        return {task.name: self._of_task(subject, task) for task in self.tasks}

    def _of_task(self, subject: Subject, task: Task) -> dict[str, float]:
        same = {
            number: {
                name: ((found == self.own[task.name][number][name]).all(-1)) for name, found in chosen.items()
            }
            for number, chosen in _choices(subject, task).items()
        }
        texts = merge_shares(same)
        names = list(next(iter(texts.values())))
        return {
            name: float(torch.cat([texts[number][name] for number in sorted(texts)]).float().mean())
            for name in names
        }


def routing_of_experts(resident: Resident, subject: Subject, tasks: Sequence[Task]) -> Routing | None:
    """What every fine-tune chooses on its own task; None for a model without routers."""
    if not routers_of(subject.module):
        return None
    own = {}
    for k, task in enumerate(tasks):
        with resident.merged.teacher(k):
            own[task.name] = _choices(subject, task)
    return Routing(tasks, own)


@torch.inference_mode()
def _choices(subject: Subject, task: Task) -> dict[int, Chosen]:
    """Each of this process's texts -> what every router chooses for its tokens."""
    numbers = own_share(range(min(TEXTS, len(task.examples))))
    return {number: _of_text(subject, task, number) for number in numbers}


def _of_text(subject: Subject, task: Task, number: int) -> Chosen:
    encoded = subject.texts(task.name, task.examples).batch([number])
    real = encoded.inputs["attention_mask"].flatten().bool()
    found: dict[str, Tensor] = {}

    def see(name: str, choice: RouterChoice) -> None:
        found[name] = choice.experts.cpu()[real].sort(dim=-1).values

    with watching_routers(routers_of(subject.module), see):
        subject.logits(task.name, encoded)
    return found
