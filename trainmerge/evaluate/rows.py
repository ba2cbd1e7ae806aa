"""The rows of a run's table: its merge, and base, average, task arithmetic and the experts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from trainmerge.evaluate.agreement import Routing, Shares, routing_of_experts
from trainmerge.evaluate.evaluation import Evaluation
from trainmerge.evaluate.harness import HarnessScore, HarnessTask, run_harness
from trainmerge.evaluate.kept import KeptScores
from trainmerge.evaluate.race import Race, can_race
from trainmerge.evaluate.score_task import score_task
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

    Of task arithmetic, merges that cannot be the best are left early where `can_race` allows it. `kept` are
    scores of earlier evaluations, by the rows' digests `models` (`score_keys.run_keys`).
    """

    resident: Resident
    subject: Subject
    held_in: Sequence[Task]
    held_out: Sequence[Task]
    uniform: Mapping[str, float]
    harness: Sequence[HarnessTask] = ()
    limit: int | None = None
    buffers: UniformBuffers | None = None
    kept: KeptScores = field(default_factory=KeptScores)
    models: Mapping[str, str] = field(default_factory=dict)
    scored: dict[str, Scored] = field(default_factory=dict)
    harnessed: dict[str, Mapping[str, HarnessScore]] = field(default_factory=dict)
    agreement: dict[str, Shares] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)  # rows whose scores were kept

    def __post_init__(self) -> None:
        self._race = Race(self.held_in) if can_race(self.held_in) else None
        self._routing: Routing | None = routing_of_experts(self.resident, self.subject, self.held_in)

    def in_order(self, compare: bool) -> list[str]:
        """All rows, task arithmetic last: first the coefficient nearest to the learned ones' mean."""
        arithmetic = [row for row in self.uniform if row.startswith(ARITHMETIC)]
        others = [row for row in self.uniform if row not in arithmetic]
        mean = float(self.resident.merged.coefficients().detach().mean())
        arithmetic.sort(key=lambda row: abs(self.uniform[row] - mean))
        for known in map(self._known, arithmetic):
            if known and self._race:
                self._race.expect(known)
        return [*others, LEARNED, *[EXPERT] * compare, *arithmetic]

    def score(self, row: str) -> None:
        """Score one row."""
        own = self.uniform.get(row)
        equal = (other for other in self.scored if own is not None and self.uniform.get(other) == own)
        if row == EXPERT:
            self.scored[row] = self._experts()
            if self._race:
                self._race.learn_from(self.scored[row])
        elif (same := next(equal, None)) is not None:
            self.scored[row] = self.scored[same]
            self.agreement |= {row: self.agreement[same]} if same in self.agreement else {}
            self.taken |= {row} if same in self.taken else set()
        elif not self._is_lost(row):
            known = self._known(row)
            forwards = known is None or self.harness or self._routing is not None
            with self._merge(row) if forwards else nullcontext():
                self._score_merge(row, known)

    def result(self, metric: Metric) -> Evaluation:
        """The rows in the table's order, of task arithmetic only the best one by mean."""
        order = [row for row in (*self.uniform, LEARNED, EXPERT, *self.scored) if row in self.scored]
        rows = {row: self.scored[row] for row in order}
        names = tuple(task.name for task in self.held_in), tuple(task.name for task in self.held_out)
        kept = keep_best_arithmetic(Evaluation(metric, *names, rows).scores, metric)
        best = {row: own for row, own in rows.items() if row in kept}
        shares = {row: self.agreement[row] for row in best if row in self.agreement}
        taken = tuple(row for row in best if row in self.taken)
        return Evaluation(metric, *names, best, self.harnessed, shares, taken)

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

    def _known(self, row: str) -> dict[str, TaskScore] | None:
        """A row's scores on all tasks that an earlier evaluation kept."""
        return self.kept.known(self.models.get(row), [*self.held_in, *self.held_out])

    def _is_lost(self, row: str) -> bool:
        """Whether a row left the race of an earlier evaluation, and cannot win this one."""
        if self._race is None or not row.startswith(ARITHMETIC):
            return False
        reach, missed = self.kept.get(self._race_key(row)) or (1.0, [])
        if lost := self._race.is_lost(reach):
            self._race.leave(missed)
        return lost

    def _race_key(self, row: str) -> str | None:
        return self.kept.key(self.models.get(row), *(task.name for task in self.held_in), about="at most")

    def _score_merge(self, row: str, known: Scored | None) -> None:
        """Score the merge that is in the model; a row that leaves the race has no scores."""
        arithmetic = row.startswith(ARITHMETIC)
        if self.harness and not arithmetic:
            folder = self.subject.tokenize.path
            self.harnessed[row] = run_harness(self.subject.module, folder, self.harness, self.limit)
        if (found := known or self._fresh(row)) is None:
            return
        self.scored[row] = {**found, **self._scores(row, self.held_out)}
        self.taken |= {row} if known else set()
        if self._race and (known or not arithmetic):
            self._race.learn_from(found)
        if self._routing is not None:
            self.agreement[row] = self._routing.agreement(self.subject)

    def _fresh(self, row: str) -> Scored | None:
        """The scores of the merge in the model on held-in tasks; None if it leaves the race."""
        if not (self._race and row.startswith(ARITHMETIC)):
            return self._scores(row, self.held_in)
        found = self._race.score(self.subject)
        if found is None:
            self.kept.put(self._race_key(row), self._race.last)
            return None
        return {name: self.kept.keep(self.models.get(row), name, own) for name, own in found.items()}

    def _scores(self, row: str, tasks: Sequence[Task]) -> Scored:
        return self.kept.scores(self.models.get(row), tasks, lambda task: score_task(self.subject, task))

    def _experts(self) -> Scored:
        """Every expert on its own task."""
        scores: dict[str, TaskScore] = {}
        fresh = False
        for k, task in enumerate(self.held_in):
            model = self.models.get(f"{EXPERT} {task.name}")
            if known := self.kept.known(model, [task]):
                scores |= known
                continue
            fresh = True
            with self.resident.merged.teacher(k):
                scores |= self.kept.scores(model, [task], lambda task: score_task(self.subject, task))
        self.taken |= set() if fresh else {EXPERT}
        return scores


def keep_best_arithmetic(rows: Scores, metric: Metric) -> Scores:
    """The rows, with only the best task-arithmetic one by mean."""
    arithmetic = [row for row in rows if row.startswith(ARITHMETIC)]
    best = metric.best(rows, arithmetic)
    return {row: scores for row, scores in rows.items() if row not in arithmetic or row == best}
