"""The rows of a run's table: its merge, and base, average, task arithmetic and the experts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from trainmerge.evaluate.agreement import Routing, Shares, routing_of_experts
from trainmerge.evaluate.evaluation import Evaluation
from trainmerge.evaluate.harness import HarnessScore, HarnessTask, run_harness
from trainmerge.evaluate.race import Race, can_race
from trainmerge.evaluate.score_task import score_task, score_tasks
from trainmerge.evaluate.subject import Subject, TaskScore
from trainmerge.evaluate.tasks import Task
from trainmerge.model.resident import Resident
from trainmerge.model.uniform_buffers import UniformBuffers
from trainmerge.run.scores import Metric, Scores

ARITHMETIC = "task arithmetic"  # the rows of one coefficient for all experts
LEARNED, EXPERT = "learned", "expert"
Scored = Mapping[str, TaskScore]


def uniform_rows(experts: int, grid: Sequence[float], compare: bool, base: bool) -> dict[str, float]:
    """Row -> the coefficient of all experts: the base, the average and task arithmetic."""
    rows: dict[str, float] = {"base": 0.0} if compare or base else {}
    if compare:
        rows |= {"average": 1 / experts} | {f"{ARITHMETIC} {c}": c for c in grid}
    return rows


@dataclass
class Rows:
    """Scores rows one after the other; equal merges are scored once.

    Of task arithmetic, merges that cannot be the best are left early where `can_race` allows it.
    """

    resident: Resident
    subject: Subject
    held_in: Sequence[Task]
    held_out: Sequence[Task]
    uniform: Mapping[str, float]
    harness: Sequence[HarnessTask] = ()
    limit: int | None = None
    buffers: UniformBuffers | None = None
    scored: dict[str, Scored] = field(default_factory=dict)
    harnessed: dict[str, Mapping[str, HarnessScore]] = field(default_factory=dict)
    agreement: dict[str, Shares] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._race = Race(self.held_in) if can_race(self.held_in) else None
        self._routing: Routing | None = routing_of_experts(self.resident, self.subject, self.held_in)

    def in_order(self, compare: bool) -> list[str]:
        """All rows, task arithmetic last: first the coefficient nearest to the learned ones' mean."""
        arithmetic = [row for row in self.uniform if row.startswith(ARITHMETIC)]
        others = [row for row in self.uniform if row not in arithmetic]
        mean = float(self.resident.merged.coefficients().detach().mean())
        arithmetic.sort(key=lambda row: abs(self.uniform[row] - mean))
        return [*others, LEARNED, *[EXPERT] * compare, *arithmetic]

    def score(self, row: str) -> None:
        """Score one row."""
        own = self.uniform.get(row)
        equal = (other for other in self.scored if own is not None and self.uniform.get(other) == own)
        if row == EXPERT:
            self.scored[row] = self._experts()
        elif (same := next(equal, None)) is not None:
            self.scored[row] = self.scored[same]
            self.agreement |= {row: self.agreement[same]} if same in self.agreement else {}
        else:
            with self._merge(row):
                self._score_merge(row)

    def result(self, metric: Metric) -> Evaluation:
        """The rows in the table's order, of task arithmetic only the best one by mean."""
        order = [row for row in (*self.uniform, LEARNED, EXPERT, *self.scored) if row in self.scored]
        rows = {row: self.scored[row] for row in order}
        names = tuple(task.name for task in self.held_in), tuple(task.name for task in self.held_out)
        kept = keep_best_arithmetic(Evaluation(metric, *names, rows).scores, metric)
        best = {row: own for row, own in rows.items() if row in kept}
        shares = {row: self.agreement[row] for row in best if row in self.agreement}
        return Evaluation(metric, *names, best, self.harnessed, shares)

    @contextmanager
    def _merge(self, row: str) -> Iterator[None]:
        """In this context the model is the row's merge."""
        if row == LEARNED:
            yield
            return
        weights = torch.full((len(self.resident.classifiers),), self.uniform[row])
        own = self.buffers.of(self.uniform[row]) if self.buffers else nullcontext()
        with self.resident.merged.uniform(weights), own:
            yield

    def _score_merge(self, row: str) -> None:
        """Score the merge that is in the model; a row that leaves the race has no scores."""
        arithmetic = row.startswith(ARITHMETIC)
        if self.harness and not arithmetic:
            folder = self.subject.tokenize.path
            self.harnessed[row] = run_harness(self.subject.module, folder, self.harness, self.limit)
        if self._race and arithmetic:
            found = self._race.score(self.subject)
            if found is None:
                return
        else:
            found = score_tasks(self.subject, self.held_in)
            if self._race:
                self._race.learn_from(found)
        self.scored[row] = {**found, **score_tasks(self.subject, self.held_out)}
        if self._routing is not None:
            self.agreement[row] = self._routing.agreement(self.subject)

    def _experts(self) -> Scored:
        """Every expert on its own task."""
        scores: dict[str, TaskScore] = {}
        for k, task in enumerate(self.held_in):
            with self.resident.merged.teacher(k):
                scores[task.name] = score_task(self.subject, task)
        return scores


def keep_best_arithmetic(rows: Scores, metric: Metric) -> Scores:
    """The rows, with only the best task-arithmetic one by mean."""
    arithmetic = [row for row in rows if row.startswith(ARITHMETIC)]
    best = metric.best(rows, arithmetic)
    return {row: scores for row, scores in rows.items() if row not in arithmetic or row == best}
