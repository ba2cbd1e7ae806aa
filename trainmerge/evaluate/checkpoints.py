"""A checkpoint folder -> its scores on a recipe's tasks."""

from collections.abc import Sequence
from pathlib import Path

from trainmerge.checkpoints import load_model, open_checkpoint
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.evaluation import Evaluation
from trainmerge.evaluate.harness import HarnessTask, run_harness
from trainmerge.evaluate.runs import DEVICE, Heads, build_heads
from trainmerge.evaluate.score_task import Subject, TaskScore, score_task
from trainmerge.evaluate.tasks import Task, load_tasks, metric_of
from trainmerge.run.recipe import Recipe
from trainmerge.run.sources import DEFAULT_LENGTH


def evaluate_checkpoint(
    checkpoint: str | Path,
    recipe: Recipe,
    limit: int | None = None,
    max_length: int = DEFAULT_LENGTH,
    answers: int = 0,
    harness: Sequence[HarnessTask] = (),
) -> Evaluation:
    """Scores of one checkpoint folder, and of the base if the recipe has held-out tasks.

    Label heads use the recipe's base. Texts are truncated to `max_length` tokens; `text_length` gives the
    length of a run's fit.
    """
    held_in, held_out = load_tasks(recipe, limit)
    tasks, tokenize = [*held_in, *held_out], Tokenizer(recipe.base, max_length)
    folders = {str(checkpoint): Path(checkpoint)}
    if held_out or harness:
        folders = {"base": Path(recipe.base), **folders}
    heads = heads_of(recipe, tasks, tokenize)
    rows, found = {}, {}
    for row, folder in folders.items():
        subject = load_checkpoint(folder, recipe, heads, tokenize, answers)
        rows[row] = score_tasks(subject, tasks)
        if harness:
            found[row] = run_harness(subject.module, recipe.base, harness, limit)
    names = tuple(task.name for task in held_in), tuple(task.name for task in held_out)
    return Evaluation(metric_of(recipe), *names, rows, found)


def heads_of(recipe: Recipe, tasks: Sequence[Task], tokenize: Tokenizer) -> Heads:
    """The tasks' heads; loads the base temporarily."""
    base = load_model(open_checkpoint(recipe.base, recipe.allow_pickle), recipe.ignore).module.to(DEVICE)
    return build_heads(base, tasks, tokenize)


def load_checkpoint(
    folder: Path, recipe: Recipe, heads: Heads, tokenize: Tokenizer, answers: int = 0
) -> Subject:
    """A checkpoint as a `Subject`."""
    module = load_model(open_checkpoint(folder, recipe.allow_pickle), recipe.ignore).module.to(DEVICE)
    return Subject(module, heads, tokenize, answers)


def score_tasks(subject: Subject, tasks: Sequence[Task]) -> dict[str, TaskScore]:
    """Scores of one model on several tasks."""
    return {task.name: score_task(subject, task) for task in tasks}
