"""Controls of a run: random task vectors, shuffled coefficients, a fresh LoRA, scored as the merge itself.

A merge that does not beat them owes nothing to its experts' directions, to what was learned for each, or to
their weights: an adapter that never saw them has learned as much from their outputs.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from trainmerge.evaluate.bootstrap import ScoreDifference, score_differences
from trainmerge.evaluate.evaluation import Evaluation
from trainmerge.evaluate.score_task import score_tasks
from trainmerge.evaluate.subject import Subject, TaskScore
from trainmerge.evaluate.tasks import Task
from trainmerge.model.controls import random_vectors, shuffled
from trainmerge.model.merged_model import MergedModel
from trainmerge.system import distributed
from trainmerge.system.console import progress

SEEDS = (1, 2, 3)
RANDOM, SHUFFLED, LEARNED = "random", "shuffled", "learned"
RANK = 16  # of the fresh adapter
FRESH = f"fresh LoRA of rank {RANK}"


def score_controls(
    merged: MergedModel, subject: Subject, tasks: Sequence[Task], fresh: AbstractContextManager[None] | None
) -> dict[str, Mapping[str, TaskScore]]:
    """Row -> task -> score of each control; shuffled only if there are several experts.

    In the context `fresh` the model is the base with a new adapter.
    """
    several = len(merged.task_vectors.experts) > 1
    controls: dict[str, AbstractContextManager[None]] = {
        f"{RANDOM} {seed}": random_vectors(merged, seed) for seed in SEEDS
    }
    controls |= {SHUFFLED: shuffled(merged)} if several else {}
    controls |= {FRESH: fresh} if fresh else {}
    found: dict[str, Mapping[str, TaskScore]] = {}
    for name in progress([*controls], "scoring controls", disable=distributed.rank() > 0):
        with controls[name]:
            found[name] = score_tasks(subject, tasks)
    return found


def behind_learned(found: Evaluation) -> dict[str, ScoreDifference]:
    """Control -> how far it is behind the learned merge, with the paired bootstrap's 95% interval."""
    rows = [name for name in found.rows if name in (SHUFFLED, FRESH) or name.startswith(f"{RANDOM} ")]
    if not rows:
        return {}
    rows = [LEARNED, *rows]
    outcomes = {task: [found.rows[row][task].outcomes for row in rows] for task in found.held_in}
    gaps = score_differences(outcomes, 0, found.metric.sign)
    return dict(zip(rows[1:], gaps[1:], strict=True))
