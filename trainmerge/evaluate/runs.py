"""A run folder -> scores of its merge, and of base, average, task arithmetic and the experts beside it.

Legend: `K` experts (tasks).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.progress import track

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.data.heads import Classifier
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.evaluation import Evaluation
from trainmerge.evaluate.harness import HarnessScore, HarnessTask, run_harness
from trainmerge.evaluate.score_task import Subject, TaskScore, score_task
from trainmerge.evaluate.tasks import Task, load_tasks, metric_of
from trainmerge.model.forward import build_classifier
from trainmerge.model.resident import Resident, load_resident
from trainmerge.run.folder import RunFolder
from trainmerge.run.open_run import open_run
from trainmerge.run.recipe import Opened, Recipe
from trainmerge.run.scores import Metric, Scores
from trainmerge.run.sources import text_length
from trainmerge.system import distributed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
Scored = Mapping[str, TaskScore]
Heads = dict[str, Classifier | None]


def evaluate_run(
    run: str | Path,
    limit: int | None = None,
    max_length: int | None = None,
    grid: Sequence[float] = GRID,
    compare: bool = True,
    answers: int = 0,
    harness: Sequence[HarnessTask] = (),
) -> Evaluation:
    """Scores of a run's merge and, to compare, of base, average, best task arithmetic and the experts.

    The best task-arithmetic coefficient is chosen on the test scores themselves: the baseline gets the
    benefit of an oracle that the learned merge does not have. The base is scored in any case where
    something is held out, because forgetting is a difference from it.

    Args:
        run: The run folder.
        limit: Score the first so many examples of each task; by default all.
        max_length: Texts are cut at so many tokens; by default as in the run's fit.
        grid: The task-arithmetic coefficients.
        compare: Score the other rows too.
        answers: Tokens to answer prompts with, where test files have a column `prompt`; 0 for none.
        harness: lm-evaluation-harness tasks, as held-out ones.
    """
    recipe, coefficients, opened = open_run(folder := RunFolder(Path(run)))
    held_in, held_out = load_tasks(recipe, limit)
    tokenize = Tokenizer(recipe.base, text_length(folder.path, max_length))
    resident, subject = load_subject(
        recipe, coefficients, opened, tokenize, folder, [*held_in, *held_out], answers
    )
    found: dict[str, dict[str, HarnessScore]] = {}

    def score(row: str, tasks: Iterable[Task]) -> dict[str, TaskScore]:
        if harness and not row.startswith("task arithmetic"):
            found[row] = run_harness(subject.module, recipe.base, harness, limit)
        return {task.name: score_task(subject, task) for task in tasks}

    everything = [*held_in, *held_out]
    rows: dict[str, Callable[[], Scored]] = {"learned": lambda: score("learned", everything)}
    settings = {"base": 0.0} if compare or held_out or harness else {}
    if compare:
        settings |= {"average": 1 / len(held_in)} | {f"task arithmetic {c}": c for c in grid}
    rows = {
        r: partial(_uniform, resident, c, partial(score, r, everything)) for r, c in settings.items()
    } | rows
    if compare:
        rows["expert"] = lambda: _experts(resident, subject, held_in)
    bar = {"description": "scoring", "disable": distributed.rank() > 0}
    scored = {row: scoring() for row, scoring in track(rows.items(), **bar)}  # type: ignore[arg-type]
    names = tuple(task.name for task in held_in), tuple(task.name for task in held_out)
    return _with_best_arithmetic(Evaluation(metric_of(recipe), *names, scored, found))


def load_subject(
    recipe: Recipe,
    coefficients: Coefficients,
    opened: Opened,
    tokenize: Tokenizer,
    folder: RunFolder,
    tasks: Sequence[Task],
    answers: int = 0,
) -> tuple[Resident, Subject]:
    """The run's merge in memory, written, and as what is scored."""
    resident = load_resident(
        recipe, opened, coefficients, tokenize, folder.workspace, DEVICE, examples=folder.examples()
    )
    heads = build_heads(resident.merged.module, tasks, tokenize)  # while it holds the base's weights
    resident.merged.materialise()
    return resident, Subject(resident.merged.module, heads, tokenize, answers)


def build_heads(base: torch.nn.Module, tasks: Sequence[Task], tokenize: Tokenizer) -> Heads:
    """Every task's head, from a model with the base's weights, which embed label texts."""
    return {task.name: build_classifier(task.head, base, tokenize) for task in tasks}


def _uniform(resident: Resident, coefficient: float, score: Callable[[], Scored]) -> Scored:
    """Scores where all experts have the same coefficient."""
    with resident.merged.uniform(torch.full((len(resident.classifiers),), coefficient)):
        return score()


def _experts(resident: Resident, subject: Subject, tasks: Sequence[Task]) -> Scored:
    """Every expert on its own task."""
    scores: dict[str, TaskScore] = {}
    for k, task in enumerate(tasks):
        with resident.merged.teacher(k):
            scores[task.name] = score_task(subject, task)
    return scores


def _with_best_arithmetic(found: Evaluation) -> Evaluation:
    kept = keep_best_arithmetic(found.scores, found.metric)
    rows = {row: scores for row, scores in found.rows.items() if row in kept}
    return Evaluation(found.metric, found.held_in, found.held_out, rows, found.harness)


def keep_best_arithmetic(rows: Scores, metric: Metric) -> Scores:
    """The rows with only the best of the task-arithmetic ones, by mean."""
    arithmetic = [row for row in rows if row.startswith("task arithmetic")]
    best = metric.best(rows, arithmetic)
    return {row: scores for row, scores in rows.items() if row not in arithmetic or row == best}
