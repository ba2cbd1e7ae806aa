"""Every task's head, and heads that are another function than the classifier their file belongs to."""

from collections.abc import Iterator

from trainmerge.checkpoints import OwnHead, beyond_linear, open_checkpoint
from trainmerge.data.heads import Head, LinearHead
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe

TaskHead = Head | OwnHead | None


def task_heads(recipe: Recipe, opened: Opened) -> dict[str, TaskHead]:
    """Expert -> the head of its task: the recipe's, else its own if its files have one, else none.

    Raises:
        ValueError: an expert's `head` is `own`, and its files have none; or see `find_own_heads`.
    """
    explicit = {name: e.head for name, e in recipe.experts.items() if isinstance(e.head, Head)}
    own = opened.own_heads if len(explicit) < len(recipe.experts) else {}
    if absent := [name for name, e in recipe.experts.items() if e.head == "own" and name not in own]:
        raise ValueError(
            f"recipe.experts: the `head` of {absent} is `own`, but their files have none, or `ignore` names "
            "it: save them with the class of their task (...ForSequenceClassification), or leave out `head`"
        )
    return {name: explicit.get(name, own.get(name)) for name in recipe.experts}


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
                f"recipe.{key}.head: {head.file} is not one matrix: {reason}. Use a base and experts that "
                "were all saved with their classifier, and no `head`; or a LabelHead"
            )
