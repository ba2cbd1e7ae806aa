"""Heads that are another function than the classifier their file belongs to."""

from collections.abc import Iterator

from trainmerge.checkpoints import beyond_linear, open_checkpoint
from trainmerge.data.heads import Head, LinearHead
from trainmerge.run.recipe import Recipe


def linear_problems(recipe: Recipe) -> Iterator[str]:
    """Every `LinearHead` whose file has more than a backbone and one matrix."""
    heads: dict[str, Head | None] = {f"experts.{name}": e.head for name, e in recipe.experts.items()}
    heads |= {f"held_out.{name}": task.head for name, task in recipe.held_out.items()}
    linear = {key: head for key, head in heads.items() if isinstance(head, LinearHead)}
    base = open_checkpoint(recipe.folders["base"], recipe.allow_pickle).tensors if linear else {}
    for key, head in linear.items():
        own = [name for name in (head.weight, head.bias) if name]
        if reason := beyond_linear(head.file, own, base):
            yield (
                f"recipe.{key}.head: {head.file} is not one matrix: {reason}. Use a base and experts that "
                "were all saved with their classifier, and no `head`; or a LabelHead"
            )
