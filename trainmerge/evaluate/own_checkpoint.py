"""A checkpoint with a head of its own: it is scored on the task of that head (`export --task`, an expert)."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trainmerge.checkpoints import OwnHead, load_model, open_checkpoint, output_of
from trainmerge.checkpoints.meta_model import architecture_of
from trainmerge.checkpoints.model_config import read_model_config
from trainmerge.checkpoints.whole import export_manifest
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.subject import Subject
from trainmerge.evaluate.tasks import Task
from trainmerge.model.own_head import whole_model
from trainmerge.model.resident import DEVICE, special_ids
from trainmerge.run.heads import TaskHead
from trainmerge.run.recipe import Recipe


def own_tasks(folder: Path, recipe: Recipe, heads: Mapping[str, TaskHead]) -> list[str]:
    """The experts whose tasks a checkpoint's own head is for; empty for one that takes the experts' heads.

    That is the task of `export --task`; and for other files of another class than the base's, the expert of
    this folder, or all experts of the same class and labels.

    Raises:
        ValueError: an export of a task that the recipe has not.
    """
    task = export_manifest(folder).get("task")
    if isinstance(task, str):
        if task not in recipe.experts:
            raise ValueError(
                f"{folder} is the export of the task {task!r}, and the recipe's experts are "
                f"{list(recipe.experts)}: give the --recipe that has this task"
            )
        return [task]
    kind = output_of(folder).architecture
    if kind == output_of(recipe.folders["base"]).architecture:
        return []
    if found := [name for name in recipe.experts if recipe.folders[name].resolve() == folder.resolve()]:
        return found if isinstance(heads[found[0]], OwnHead) else []
    own = {name: head for name, head in heads.items() if isinstance(head, OwnHead) and name in recipe.experts}
    alike = [name for name, head in own.items() if head.kind.__name__ == kind]
    labels = _head_of(folder).labels if alike else {}
    return [name for name in alike if own[name].labels == labels]


def narrowed(recipe: Recipe, names: Sequence[str], folder: Path) -> Recipe:
    """The recipe with these experts' tasks alone; warns if it has held-out tasks, which are not scored."""
    if recipe.held_out:
        warnings.warn(
            f"{folder} has a head of its own, so the held-out tasks {list(recipe.held_out)} are not scored",
            stacklevel=2,
        )
    experts = {name: replace(recipe.experts[name], weight=1.0) for name in names}
    return replace(  # the tokenizer's keys may name other experts
        recipe,
        experts=experts,
        held_out={},
        tokenizer=None,
        chat_template=None,
        generation_config=None,
    )


def own_subject(
    folder: Path, recipe: Recipe, tasks: Sequence[Task], tokenize: Tokenizer, answers: int | None = None
) -> Subject:
    """The checkpoint as it is, with its own head for each of these tasks.

    Raises:
        ValueError: as `load_model`; or see `OwnHead.padding`.
    """
    head = _head_of(folder)
    module = load_model(open_checkpoint(folder, recipe.allow_pickle), recipe.ignore).module.to(DEVICE)
    model = whole_model(head, module, special_ids(tokenize))
    return Subject(module, {task.name: model for task in tasks}, tokenize, answers)


def _head_of(folder: Path) -> OwnHead:
    """The head of a checkpoint that is a whole, so nothing is shared and nothing is apart."""
    config = read_model_config(folder)
    return OwnHead(folder, architecture_of(config), config, folder / "config.json", {}, {})
