"""The tasks of a recipe: experts with their data, and tasks that are only scored."""

from dataclasses import dataclass
from typing import Literal

from trainmerge.data.generate import Generate
from trainmerge.data.heads import Head
from trainmerge.system.ranges import check_fields
from trainmerge.system.text import shortened


@dataclass(frozen=True)
class Expert:
    """One expert and the data of its task.

    Args:
        path: A transformers checkpoint folder or a peft adapter folder, or its id on the hub.
        calibration: Unlabeled examples to learn from: a JSONL, CSV, parquet or text file, or a saved dataset;
            or `{generate: N}`: texts that the expert writes itself.
        test: Labelled examples, for `evaluate` only; a fit never reads their labels.
        head: The task's frozen head: a class, or `own`, the head in the expert's files by its own class. That
            one is used without `head` too, where the base has no head of the same labels.
        weight: Weight of this task in the loss.
        validation: Labelled examples for `search` to choose coefficients by; separate from `test`.
    """

    path: str
    calibration: str | Generate | None = None
    test: str | None = None
    head: Head | Literal["own"] | None = None
    weight: float = 1.0
    validation: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, f"expert {shortened(str(self.path), 200)}", weight="[0, inf)")


@dataclass(frozen=True)
class HeldOut:
    """A task without an expert, on which `evaluate` measures forgetting.

    Args:
        test: Labelled examples, or texts for a language model.
        head: The task's frozen head; none for a language model, and `own`, or none, with a `path`.
        path: A checkpoint of the base's architecture: the head in its files scores the task on every merge.
    """

    test: str
    head: Head | Literal["own"] | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.head == "own") > bool(self.path) or (isinstance(self.head, Head) and self.path):
            raise ValueError("recipe.held_out: a task has a `head`, or a `path` to the files of its own head")
