"""Every task's head, and heads that are another function than the classifier their file belongs to."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from trainmerge.checkpoints import OwnHead, beyond_linear, may_have_head, open_checkpoint
from trainmerge.data.heads import Head, LinearHead
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe

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


def _own_heads(recipe: Recipe, opened: Opened | None) -> dict[str, OwnHead]:
    if opened is not None:
        return opened.own_heads
    if not any(may_have_head(Path(expert.path)) for expert in recipe.experts.values()):
        return {}
    with TemporaryDirectory() as place:  # of adapters that peft merges
        return recipe.open(Path(place)).own_heads


def linear_problems(recipe: Recipe) -> Iterator[str]:
    """Every `LinearHead` whose file has more than a backbone and one matrix."""
    heads: dict[str, Head | str | None] = {f"experts.{name}": e.head for name, e in recipe.experts.items()}
    heads |= {f"held_out.{name}": task.head for name, task in recipe.held_out.items()}
    linear = {key: head for key, head in heads.items() if isinstance(head, LinearHead)}
    base = open_checkpoint(recipe.base, recipe.allow_pickle).tensors if linear else {}
    for key, head in linear.items():
        own = [name for name in (head.weight, head.bias) if name]
        if reason := beyond_linear(head.file, own, base):
            yield (
                f"recipe.{key}.head: {head.file} is not one matrix: {reason}. Without `head` an "
                "expert's own head is used, by its class; or set a LabelHead"
            )
