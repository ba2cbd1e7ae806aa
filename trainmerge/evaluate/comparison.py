"""Several runs and checkpoints on the same tasks, and whether their differences are significant."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.progress import track

from trainmerge.checkpoints import same_ids
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.bootstrap import ScoreDifference, score_differences
from trainmerge.evaluate.checkpoints import SharedHeads, check_kind, load_checkpoint, over, shared_heads
from trainmerge.evaluate.evaluation import Evaluation
from trainmerge.evaluate.kept import KeptScores, scores_beside
from trainmerge.evaluate.measure import metric_of
from trainmerge.evaluate.own_checkpoint import narrowed, own_subject, own_tasks
from trainmerge.evaluate.runs import load_subject
from trainmerge.evaluate.score_keys import checkpoint_key, kept_for, merge_key
from trainmerge.evaluate.score_task import score_task
from trainmerge.evaluate.subject import Subject, TaskScore
from trainmerge.evaluate.tasks import Task, load_tasks
from trainmerge.evaluate.vocabulary import Reading, reading
from trainmerge.model.embedding import read_embedding
from trainmerge.run.folder import RunFolder
from trainmerge.run.heads import all_heads
from trainmerge.run.open_run import open_run
from trainmerge.run.sources import columns_of, tasks_of, text_length
from trainmerge.system import distributed
from trainmerge.system.atomic import write_whole
from trainmerge.system.hub import folder_of


@dataclass(frozen=True)
class Comparison:
    """An evaluation with the best row, and every row's difference from it in the mean over held-in tasks."""

    evaluation: Evaluation
    best: str
    differences: dict[str, ScoreDifference]

    def to_json(self) -> dict[str, Any]:
        """The evaluation's rows, each with its difference."""
        content = self.evaluation.to_json()
        for row, difference in self.differences.items():
            content[row]["difference"] = {
                **difference._asdict(), "from": self.best, "noise": difference.noise
            }  # fmt: skip
        return content

    def write(self, path: Path) -> None:
        """The comparison as JSON data."""
        write_whole(path, json.dumps(self.to_json(), indent=2))


def compare(
    paths: Sequence[str | Path],
    recipe: str | Path | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    reuse: bool = True,
) -> Comparison:
    """Score runs and checkpoints on the tasks of `recipe`: a run folder, an export or a configuration.

    Without `recipe`, the first path's tasks are used. All texts are truncated as in the recipe's own fit.
    Checkpoints with a head of their own, an `export --task` or an expert, restrict the tasks to theirs.
    With `reuse`, scores are taken from earlier evaluations of runs beside the one that gives the tasks.

    Raises:
        ValueError: fewer than two paths, a repeated path, different architectures, or no task in common.
    """
    names = [str(path) for path in paths]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ValueError("give two or more different runs or checkpoints to compare")
    source = Path(recipe or paths[0])
    shared = tasks_of(source)
    with reading(shared) as words:
        return _compared(_rows(words, source, names, limit, max_length, reuse))


def _rows(
    words: Reading, source: Path, names: Sequence[str], limit: int | None, max_length: int | None, reuse: bool
) -> Evaluation:
    shared = words.recipe
    folders = {name: folder_of(name, allow_pickle=shared.allow_pickle) for name in names}
    own = all_heads(shared)
    alone = {name: own_tasks(folder, shared, own) for name, folder in folders.items() if not _is_run(folder)}
    alone = {name: tasks for name, tasks in alone.items() if tasks}
    if alone:
        common = _common(alone)
        shared, own = (
            narrowed(shared, common, folders[next(iter(alone))]),
            {name: own[name] for name in common},
        )
    metric, tokenize = metric_of(shared, own), Tokenizer(words.tokenizer, text_length(source, max_length))
    held_in, held_out = load_tasks(shared, tokenize, columns_of(source), limit, heads=own)
    tasks = [*held_in, *held_out]
    heads = shared_heads(words, shared, tasks, tokenize)
    kept = kept_for(scores_beside(source) if reuse else None, tasks, tokenize, words.recipe)
    if held_out:
        folders = {"base": shared.folders["base"], **folders}
    bar = track(folders.items(), description="comparing", disable=distributed.rank() > 0)
    rows, taken = {}, []
    for name, folder in bar:
        if name in alone:
            model = checkpoint_key(kept, folder, words.recipe, alone=True)
            load: Callable[[], Subject] = partial(
                own_subject, words.open(folder).path, shared, tasks, tokenize
            )
        else:
            model, load = _row(folder, words, heads, kept, tasks, tokenize)
        taken += [name] if kept.known(model, tasks) else []
        rows[name] = kept.scores(model, tasks, _scorer(load))
    held = tuple(task.name for task in held_in), tuple(task.name for task in held_out)
    return Evaluation(metric, *held, rows, taken=tuple(taken))


def _is_run(folder: Path) -> bool:
    return RunFolder(folder).manifest.exists()


def _common(tasks: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks that all of these checkpoints have heads for."""
    (first, *_), others = tasks.values(), [set(names) for names in tasks.values()]
    if found := [name for name in first if all(name in names for names in others)]:
        return found
    listed = "; ".join(f"{path} of {', '.join(names)}" for path, names in tasks.items())
    raise ValueError(f"these checkpoints have heads of their own, and no task in common: {listed}")


def _row(
    folder: Path,
    words: Reading,
    heads: SharedHeads,
    kept: KeptScores,
    tasks: Sequence[Task],
    tokenize: Tokenizer,
) -> tuple[str | None, Callable[[], Subject]]:
    """A digest of a run's merge or of a checkpoint under the tasks' heads, and how to load it."""
    run, recipe = RunFolder(folder), words.recipe
    if not _is_run(folder):
        check_kind(folder, recipe, tasks)
        load = partial(load_checkpoint, words.open(folder), recipe, heads, tasks, tokenize)
        return checkpoint_key(kept, folder, recipe, alone=False), load
    own, coefficients, opened = open_run(run)
    if (recipe.choice.moves_rows or own.choice.moves_rows) and not same_ids(
        Path(words.tokenizer), opened.base.path
    ):
        raise ValueError(
            f"{folder}: its merge has another tokenizer than {recipe.base}'s tasks are read with: "
            "compare runs of one tokenizer"
        )

    def load_run() -> Subject:
        placeable, references = heads()
        resident, subject = load_subject(own, coefficients, opened, tokenize, run, [])
        placed = over(placeable, subject.module, resident.merged.names, tokenize)
        embedding = read_embedding(opened.base) if any(task.similar for task in tasks) else None
        return replace(subject, heads=placed, embedding=embedding, references=references)

    return merge_key(kept, run, own, opened, coefficients), load_run


def _scorer(load: Callable[[], Subject]) -> Callable[[Task], TaskScore]:
    """Scores tasks with a model that is loaded for the first of them."""
    loaded = cache(load)
    return lambda task: score_task(loaded(), task)


def _compared(found: Evaluation) -> Comparison:
    rows = list(found.rows)
    best = found.metric.best(found.scores, rows)
    assert best is not None
    outcomes = {task: [found.rows[row][task].outcomes for row in rows] for task in found.held_in}
    gaps = score_differences(outcomes, rows.index(best), found.metric.sign)
    return Comparison(found, best, dict(zip(rows, gaps, strict=True)))
