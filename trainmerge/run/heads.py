"""Every task's head, and heads that are another function than the classifier their file belongs to."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from trainmerge.checkpoints import (
    OwnHead,
    beyond_linear,
    find_own_heads,
    find_sources,
    may_have_head,
    open_checkpoint,
)
from trainmerge.data.heads import Head, LabelHead, LinearHead
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.system.hub import folder_of

TaskHead = Head | OwnHead | None


def task_heads(recipe: Recipe, opened: Opened | None = None) -> dict[str, TaskHead]:
    """Expert -> the head of its task: the recipe's, else its own if its files have one, else none.

    Without `opened`, the files are opened only if one of them may have a head.

    Raises:
        ValueError: an expert's `head` is `own`, and its files have none; or a part of a head is in no file.
    """
    explicit = {name: e.head for name, e in recipe.experts.items() if isinstance(e.head, Head)}
    own = _own_heads(recipe, opened) if len(explicit) < len(recipe.experts) else {}
    if absent := [name for name, e in recipe.experts.items() if e.head == "own" and name not in own]:
        raise ValueError(
            f"recipe.experts: the `head` of {absent} is `own`, but their files have none, or `ignore` names "
            "it: save them with the class of their task (...ForSequenceClassification), or leave out `head`"
        )
    for name, head in own.items():
        if name not in explicit:
            head.check()
    return {name: explicit.get(name, own.get(name)) for name in recipe.experts}


def all_heads(recipe: Recipe, opened: Opened | None = None) -> dict[str, TaskHead]:
    """The heads of the experts' and the held-out tasks. Raises as `task_heads` and `held_out_heads`."""
    return held_out_heads(recipe) | task_heads(recipe, opened)


def held_out_heads(recipe: Recipe) -> dict[str, TaskHead]:
    """Held-out task -> its head: the recipe's, or the own head in the files of its `path`.

    Raises:
        ValueError: files that do not fit the base, or without a head; or a part of a head is in no file.
    """
    found: dict[str, TaskHead] = {
        name: task.head for name, task in recipe.held_out.items() if not isinstance(task.head, str)
    }
    given = {name: task.path for name, task in recipe.held_out.items() if task.path}
    if not given:
        return found
    folders = {name: folder_of(path, True, recipe.allow_pickle) for name, path in given.items()}
    base = open_checkpoint(recipe.folders["base"], recipe.allow_pickle)
    with TemporaryDirectory() as place:  # as below
        sources = find_sources(
            base,
            folders,
            ignore=recipe.ignore,
            allow_pickle=recipe.allow_pickle,
            workspace=Path(place),
            shared_vocabulary=recipe.vocabulary == "shared",
            own_heads=[*folders],
        )
        own = find_own_heads(base, folders, sources, recipe.ignore, recipe.allow_pickle)
    if absent := [name for name in folders if name not in own]:
        raise ValueError(
            f"recipe.held_out: the files of {absent} have no head of their own: `path` names a checkpoint of "
            "the class of its task (...ForSequenceClassification); or set a `head`"
        )
    for head in own.values():
        head.check()
    return found | own


def _own_heads(recipe: Recipe, opened: Opened | None) -> dict[str, OwnHead]:
    if opened is not None:
        return opened.own_heads
    if not any(may_have_head(Path(expert.path)) for expert in recipe.experts.values()):
        return {}
    with TemporaryDirectory() as place:  # of adapters that peft merges
        return recipe.open(Path(place), aligned=False).own_heads


def unusable_heads(recipe: Recipe) -> Iterator[str]:
    """Every `LinearHead` whose file has more than one matrix, and every `LabelHead` without label texts."""
    heads: dict[str, Head | str | None] = {f"experts.{name}": e.head for name, e in recipe.experts.items()}
    heads |= {f"held_out.{name}": task.head for name, task in recipe.held_out.items()}
    for key, head in heads.items():
        if isinstance(head, LabelHead):
            try:
                head.identity()  # reads its files
            except ValueError as error:
                yield f"recipe.{key}.head: {error}"
    linear = {key: head for key, head in heads.items() if isinstance(head, LinearHead)}
    base = open_checkpoint(recipe.folders["base"], recipe.allow_pickle).tensors if linear else {}
    for key, head in linear.items():
        own = [name for name in (head.weight, head.bias) if name]
        if reason := beyond_linear(head.file, own, base):
            yield (
                f"recipe.{key}.head: {head.file} is not one matrix: {reason}. Without `head` an "
                "expert's own head is used, by its class; or set a LabelHead"
            )
