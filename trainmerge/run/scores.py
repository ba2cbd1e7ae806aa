"""Scores (accuracy with a head, perplexity of language models, similarity of embedders), means over tasks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Scores = dict[str, dict[str, float]]  # row of a table -> task -> score


@dataclass(frozen=True)
class Metric:
    """One kind of score."""

    # `score`: several kinds
    name: Literal["accuracy", "perplexity", "exact_match", "f1", "pearson", "score", "similarity"]

    @property
    def sign(self) -> int:
        """1 where a higher score is better, -1 where a lower one is."""
        return -1 if self.name == "perplexity" else 1

    def mean(self, scores: Mapping[str, float]) -> float:
        """Mean over the tasks; the geometric mean for perplexity."""
        values = list(scores.values())
        if self.name == "perplexity":
            return math.exp(sum(math.log(value) for value in values) / len(values))
        return sum(values) / len(values)

    def best(self, rows: Scores, names: Sequence[str]) -> str | None:
        """The row with the best mean; None without rows."""
        return max(names, key=lambda row: self.sign * self.mean(rows[row]), default=None)

    def normalised(self, rows: Scores) -> dict[str, float]:
        """Each row's score relative to the experts; empty without their scores.

        Accuracy and the like: mean over the tasks of score / the expert's score, without tasks where that is
        0.
        Perplexity: the share of the gap between base and experts that is closed, in logs of the means.
        Similarity: the share of that gap, in the means.
        """
        if "expert" not in rows:
            return {}
        expert = rows["expert"]
        if self.name not in ("perplexity", "similarity"):
            used = [task for task in expert if expert[task]]
            return {
                row: sum(scores[task] / expert[task] for task in used) / len(used)
                for row, scores in rows.items()
            }
        if "base" not in rows:
            return {}
        if self.name == "similarity":
            means = {row: self.mean(scores) for row, scores in rows.items()}
            gap = means["expert"] - means["base"]
            return {row: (mean - means["base"]) / gap for row, mean in means.items()} if gap else {}
        logs = {row: math.log(self.mean(scores)) for row, scores in rows.items()}
        gap = logs["base"] - logs["expert"]
        return {row: (logs["base"] - log) / gap for row, log in logs.items()} if gap else {}

    def forgetting(self, rows: Scores) -> dict[str, float]:
        """Each row's loss relative to the base (MergeBench, arXiv 2505.10833); empty without the base.

        Accuracy: the mean difference over the tasks. Perplexity: the mean difference of logarithms, in nats
            per token.
        Negative where a row is better than the base.
        """
        if "base" not in rows:
            return {}
        base = rows["base"]
        return {
            row: sum(self._worse(scores[task], base[task]) for task in base) / len(base)
            for row, scores in rows.items()
        }

    def _worse(self, score: float, than: float) -> float:
        return math.log(score / than) if self.name == "perplexity" else than - score


ACCURACY, PERPLEXITY, SIMILARITY = Metric("accuracy"), Metric("perplexity"), Metric("similarity")


def score_rows(
    title: str,
    rows: Mapping[str, Mapping[str, float]],
    means: Mapping[str, float],
    normalised: Mapping[str, float],
) -> tuple[list[str], list[list[str]]]:
    """Header and cells: one column per task, then mean and normalised mean."""
    tasks = list(next(iter(rows.values())))
    header = [title, *tasks, "mean", "norm."]
    cells = [
        [row, *(f"{scores[task]:.3f}" for task in tasks), f"{means[row]:.3f}",
         f"{normalised[row]:.3f}" if row in normalised else ""]
        for row, scores in rows.items()
    ]  # fmt: skip
    return header, cells
