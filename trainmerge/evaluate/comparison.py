"""Several runs and checkpoints on the same tasks, and whether their differences are significant."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import track
from torch import Tensor

from trainmerge.checkpoints import same_ids
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.bootstrap import ScoreDifference, score_differences
from trainmerge.evaluate.checkpoints import PlannedHeads, check_kind, load_checkpoint, over, plan_heads
from trainmerge.evaluate.evaluation import Evaluation
from trainmerge.evaluate.measure import metric_of
from trainmerge.evaluate.own_checkpoint import narrowed, own_subject, own_tasks
from trainmerge.evaluate.runs import load_subject, references_from_files
from trainmerge.evaluate.score_task import score_tasks
from trainmerge.evaluate.subject import TaskScore
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
) -> Comparison:
    """Score runs and checkpoints on the tasks of `recipe`: a run folder, an export or a configuration.

    Without `recipe`, the first path's tasks are used. All texts are truncated as in the recipe's own fit.
    Checkpoints with a head of their own, an `export --task` or an expert, restrict the tasks to theirs.

    Raises:
        ValueError: fewer than two paths, a repeated path, different architectures, or no task in common.
    """
    names = [str(path) for path in paths]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ValueError("give two or more different runs or checkpoints to compare")
    source = Path(recipe or paths[0])
    shared = tasks_of(source)
    with reading(shared) as words:
        return _compared(_rows(words, source, names, limit, max_length))


def _rows(
    words: Reading, source: Path, names: Sequence[str], limit: int | None, max_length: int | None
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
    heads = plan_heads(words, tasks, tokenize)
    if held_out:
        folders = {"base": shared.folders["base"], **folders}
    bar = track(folders.items(), description="comparing", disable=distributed.rank() > 0)
    references = references_from_files(shared, tasks, tokenize)
    rows = {
        name: score_tasks(own_subject(words.open(folder).path, shared, tasks, tokenize), tasks)
        if name in alone
        else _score(folder, words, heads, references, tasks, tokenize)
        for name, folder in bar
    }
    held = tuple(task.name for task in held_in), tuple(task.name for task in held_out)
    return Evaluation(metric, *held, rows)


def _is_run(folder: Path) -> bool:
    return RunFolder(folder).manifest.exists()


def _common(tasks: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks that all of these checkpoints have heads for."""
    (first, *_), others = tasks.values(), [set(names) for names in tasks.values()]
    if found := [name for name in first if all(name in names for names in others)]:
        return found
    listed = "; ".join(f"{path} of {', '.join(names)}" for path, names in tasks.items())
    raise ValueError(f"these checkpoints have heads of their own, and no task in common: {listed}")


def _score(
    folder: Path,
    words: Reading,
    heads: PlannedHeads,
    references: Mapping[str, Tensor],
    tasks: Sequence[Task],
    tokenize: Tokenizer,
) -> dict[str, TaskScore]:
    run = RunFolder(folder)
    if not _is_run(folder):
        check_kind(folder, words.recipe, tasks)
        subject = load_checkpoint(
            words.open(folder), words.recipe, heads, tasks, tokenize, references=references
        )
        return score_tasks(subject, tasks)
    own, coefficients, opened = open_run(run)
    if (words.recipe.choice.moves_rows or own.choice.moves_rows) and not same_ids(
        Path(words.tokenizer), opened.base.path
    ):
        raise ValueError(
            f"{folder}: its merge has another tokenizer than {words.recipe.base}'s tasks are read with: "
            "compare runs of one tokenizer"
        )
    resident, subject = load_subject(own, coefficients, opened, tokenize, run, [])
    placed = over(heads, subject.module, resident.merged.names, tokenize)
    embedding = read_embedding(opened.base) if any(task.similar for task in tasks) else None
    return score_tasks(replace(subject, heads=placed, embedding=embedding, references=references), tasks)


def _compared(found: Evaluation) -> Comparison:
    rows = list(found.rows)
    best = found.metric.best(found.scores, rows)
    assert best is not None
    outcomes = {task: [found.rows[row][task].outcomes for row in rows] for task in found.held_in}
    gaps = score_differences(outcomes, rows.index(best), found.metric.sign)
    return Comparison(found, best, dict(zip(rows, gaps, strict=True)))
