"""Tasks to score a model on: test examples, with labels for a head, and prompts to answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from trainmerge.data.examples import load_examples
from trainmerge.data.heads import Head
from trainmerge.run.recipe import Recipe
from trainmerge.run.scores import ACCURACY, PERPLEXITY, Metric
from trainmerge.system.ranges import check_option

Split = Literal["test", "validation"]


@dataclass(frozen=True)
class Task:
    """One task's examples; labels if it has a head, prompts if its file has them."""

    name: str
    texts: Sequence[str]
    labels: Sequence[int] = ()
    prompts: Sequence[str] = ()
    head: Head | None = None


class HasTest(Protocol):
    """Anything with test examples: an expert of a recipe, or a held-out task."""

    @property
    def test(self) -> str | None:
        """Labelled examples, or texts."""

    @property
    def head(self) -> Head | None:
        """The task's classifier."""


def metric_of(recipe: Recipe) -> Metric:
    """The metric of the tasks.

    Raises:
        ValueError: only some have a head.
    """
    tasks: list[HasTest] = [*recipe.experts.values(), *recipe.held_out.values()]
    heads = {task.head is not None for task in tasks}
    if len(heads) > 1:
        raise ValueError("only some tasks have a head: score the two kinds in separate recipes")
    return ACCURACY if heads == {True} else PERPLEXITY


def load_tasks(
    recipe: Recipe, limit: int | None = None, split: Split = "test"
) -> tuple[list[Task], list[Task]]:
    """The experts' tasks (held in) and the held-out ones, the first `limit` examples of each.

    Raises:
        ValueError: `limit` is not positive; a task has no such file, or the file lacks `text` or, with a
            head, `label`; a held-out task has an expert's name; only some tasks have a head.
    """
    metric_of(recipe)
    check_option("limit", limit, int | None, "[1, inf)")
    if twice := recipe.experts.keys() & recipe.held_out.keys():
        raise ValueError(f"recipe.held_out: {sorted(twice)} are names of experts; rename these tasks")
    files = {name: getattr(expert, split) for name, expert in recipe.experts.items()}
    held_in = [_load(name, files[name], e.head, limit, split) for name, e in recipe.experts.items()]
    if split != "test":
        return held_in, []
    return held_in, [
        _load(name, task.test, task.head, limit, split) for name, task in recipe.held_out.items()
    ]


def _load(name: str, file: str | None, head: Head | None, limit: int | None, split: Split) -> Task:
    if not file:
        raise ValueError(
            f"{name}: scoring needs `{split}`, a file with a column text and, with a `head`, a column label"
        )
    data = load_examples(file, ["text", "label"] if head else ["text"], optional=["prompt"])
    count = len(data) if limit is None else min(limit, len(data))
    labels = list(data["label"][:count]) if head else []
    if wrong := [label for label in labels if not isinstance(label, int) or label < 0]:
        raise ValueError(f"{file}: label {wrong[0]!r} is not a class number (0, 1, ...)")
    prompts = list(data["prompt"][:count]) if "prompt" in data.column_names else []
    return Task(name, list(data["text"][:count]), labels, prompts, head)
