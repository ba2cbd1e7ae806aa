"""Scores of several models on held-in and held-out tasks, with means and forgetting."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainmerge.evaluate.agreement import Shares
from trainmerge.evaluate.harness import HarnessScore
from trainmerge.evaluate.subject import TaskScore
from trainmerge.run.scores import Metric, Scores
from trainmerge.system.atomic import write_whole

Rows = Mapping[str, Mapping[str, TaskScore]]  # row -> task -> its score


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. Held-in tasks are the experts'; held-out ones are the recipe's `held_out`.

    `agreement` is of mixtures of experts: the share of tokens that a merge sends to the same set of experts
    as the task's own fine-tune does, by layer (`agreement.Routing`). `taken` are the rows whose scores an
    earlier evaluation kept.
    """

    metric: Metric
    held_in: tuple[str, ...]
    held_out: tuple[str, ...]
    rows: Rows
    harness: Mapping[str, Mapping[str, HarnessScore]] = field(default_factory=dict)  # row -> task
    agreement: Mapping[str, Shares] = field(default_factory=dict)  # row -> task -> router -> share of tokens
    taken: tuple[str, ...] = ()

    @property
    def scores(self) -> Scores:
        """Row -> held-in task -> score."""
        return self._of(self.held_in)

    @property
    def others(self) -> Scores:
        """Row -> held-out task -> score, for the rows that were scored on them."""
        return self._of(self.held_out) if self.held_out else {}

    def _of(self, names: Iterable[str]) -> Scores:
        wanted = list(names)
        return {
            row: {task: scores[task].score for task in wanted}
            for row, scores in self.rows.items()
            if scores.keys() >= set(wanted)
        }

    def means(self) -> dict[str, float]:
        """Row -> mean over the held-in tasks."""
        return {row: self.metric.mean(scores) for row, scores in self.scores.items()}

    def normalised(self) -> dict[str, float]:
        """Row -> score relative to the experts on held-in tasks; empty without experts' scores."""
        return self.metric.normalised(self.scores)

    def forgetting(self) -> dict[str, float]:
        """Row -> loss relative to the base on held-out tasks; empty without base or such tasks."""
        return self.metric.forgetting(self.others)

    def measures(self) -> dict[str, dict[str, float]]:
        """Row -> every measure's mean over the held-in tasks that have it."""
        found: dict[str, dict[str, float]] = {}
        for row, scores in self.rows.items():
            own = [scores[task].measures for task in self.held_in if task in scores]
            names = {name: None for measures in own for name in measures}
            having = {name: [m[name] for m in own if name in m] for name in names}
            found[row] = {name: sum(values) / len(values) for name, values in having.items()}
        return found

    def layers(self) -> dict[str, dict[str, float]]:
        """Router -> row -> share of tokens that agree, the mean over the tasks; empty for dense models."""
        found: dict[str, dict[str, float]] = {}
        for row, tasks in self.agreement.items():
            for name in next(iter(tasks.values())):
                shares = [own[name] for own in tasks.values()]
                found.setdefault(name, {})[row] = sum(shares) / len(shares)
        return found

    def to_json(self) -> dict[str, Any]:
        """One entry per row: its score on every held-in task, the means, and all measures."""
        normalised, forgetting, means = self.normalised(), self.forgetting(), self.means()
        content: dict[str, Any] = {}
        for row, scores in self.scores.items():
            content[row] = {**scores, "mean": means[row]}
            content[row] |= {"normalised": normalised[row]} if row in normalised else {}
            content[row] |= {"held_out": self.others[row]} if row in self.others else {}
            content[row] |= {"forgetting": forgetting[row]} if row in forgetting else {}
            content[row]["measures"] = {task: dict(s.measures) for task, s in self.rows[row].items()}
            if row in self.agreement:
                content[row]["routing"] = {task: dict(own) for task, own in self.agreement[row].items()}
            if row in self.harness:
                content[row]["harness"] = {task: s._asdict() for task, s in self.harness[row].items()}
        return content

    def write(self, path: Path) -> None:
        """The evaluation as JSON data."""
        write_whole(path, json.dumps(self.to_json(), indent=2))

    def write_scores(self, path: Path, learned: Mapping[str, Any] | None = None) -> None:
        """Scores of the held-in tasks only, with mean and normalised mean per row.

        `learned` are entries of the learned merge's row: which coefficients were scored. Without them
        a report does not know whether the scores are still the run's.
        """
        keys = {*self.held_in, "mean", "normalised"}
        short = {row: {k: v for k, v in all_.items() if k in keys} for row, all_ in self.to_json().items()}
        short["learned"] |= learned or {}
        write_whole(path, json.dumps(short, indent=2))
