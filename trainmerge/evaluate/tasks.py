"""Tasks to score a model on: test examples, with labels for a classifier, and prompts to answer."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from trainmerge.checkpoints import Output, OwnHead, output_of
from trainmerge.data.batch import Kind
from trainmerge.data.columns import Columns
from trainmerge.data.examples import Example, read_examples
from trainmerge.data.media import without_text
from trainmerge.data.text_files import load_examples
from trainmerge.data.token_checks import check_lengths
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.answers import COLUMN, read_answers
from trainmerge.evaluate.measure import kind_of_head, metric_of, predicted
from trainmerge.evaluate.pairs import EXPERT, Similar, read_similar
from trainmerge.evaluate.task_checks import check_labels
from trainmerge.model.embedding_settings import unfollowed_settings
from trainmerge.run.heads import TaskHead, all_heads, unusable_heads
from trainmerge.run.recipe import Recipe
from trainmerge.run.scores import PERPLEXITY, SIMILARITY
from trainmerge.system.ranges import check_option

Split = Literal["test", "validation"]


@dataclass(frozen=True)
class Task:
    """One task's examples; labels if its measure is accuracy, prompts if its file has them."""

    name: str
    examples: Sequence[Example]
    labels: Sequence[Any] = ()
    prompts: Sequence[str] = ()
    head: TaskHead = None
    kind: Kind = "classes"  # of the outputs that have labels
    similar: Similar | None = None  # of a sentence embedder


@dataclass(frozen=True)
class TestFiles:
    """How test files are read: as the fit read its calibration files.

    Args:
        output: What the base is.
        labelled: Whether the tasks' measure is accuracy.
        columns: The fit's columns.
        tokenize: The base's tokenizer, which renders chats.
        limit: Read the first so many examples of each file; None reads all.
        split: Which of a task's files to read.
        embedded: Whether the model is a sentence embedder.
    """

    output: Output
    labelled: bool
    columns: Columns
    tokenize: Tokenizer
    limit: int | None
    split: Split
    embedded: bool = False

    def task(self, name: str, file: str | None, head: TaskHead) -> Task:
        """One task.

        Raises:
            ValueError: see `load_tasks`.
        """
        if not file:
            raise ValueError(
                f"{name}: scoring needs `{self.split}`, a file with the fit's columns and, for classifiers, "
                "a column label"
            )
        if self.embedded:
            return self._pairs(name, file)
        columns, kind = self._columns(), kind_of_head(head)
        names = [*columns.names(), *[COLUMN[kind]] * self.labelled]
        try:
            data = load_examples(
                file, names, optional=["prompt"], numbers=[*set(COLUMN.values())], media=columns.media
            )
        except ValueError as error:
            raise ValueError(
                f"{error}. A {self.split} file needs the columns {names}: data.columns of the fit names the "
                "text's"
            ) from error
        count = len(data) if self.limit is None else min(self.limit, len(data))
        examples = read_examples(file, columns, self.tokenize.render, count, located=not self.labelled)
        self._check(file, examples)
        labels = list(data[COLUMN[kind]][:count]) if self.labelled else []
        if isinstance(head, OwnHead):
            labels = read_answers(file, kind, labels, examples, head.labels)
        else:
            check_labels(file, labels, head.classes() if head else self.output.labels)
        prompts = list(data["prompt"][:count]) if "prompt" in data.column_names else []
        if wrong := [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str) or not prompt]:
            raise ValueError(f"{file}: example {wrong[0]} has no text for 'prompt': write one, or remove it")
        return Task(name, examples, labels, prompts, head, kind)

    def _pairs(self, name: str, file: str) -> Task:
        """A sentence embedder's task."""
        columns = replace(self.columns, spans=None, target=None)
        if columns.text is None:
            raise ValueError(
                f"{file}: sentence embedders compare texts: set data.columns.text to their column"
            )
        examples = read_examples(file, columns, self.tokenize.render, self.limit, located=False)
        self._check(file, examples)
        return Task(name, examples, similar=read_similar(file, columns.text, len(examples)))

    def _columns(self) -> Columns:
        """The columns that the measure depends on: no spans or targets for accuracy."""
        if self.labelled:
            return replace(self.columns, spans=None, target=None)
        if self.output.kind != "sequence-to-sequence model":
            return replace(self.columns, target=None)
        if self.columns.target is None:
            raise ValueError(
                f"{self.output.architecture} is a {self.output.kind}: its perplexity is that of the "
                "decoder's targets. Set data.columns.target to their column, in calibration and test files"
            )
        return self.columns

    def _check(self, file: str, examples: Sequence[Example]) -> None:
        """Every example has a text, picture or sound and, for perplexity, a token that is predicted."""
        alone = without_text(examples)
        if unreadable := self.tokenize.media.problems(examples) if alone else []:
            raise ValueError(
                f"{file}: {len(unreadable)} of {len(examples)} cannot be read, the first: {unreadable[0]}"
            )
        try:
            own = self.output.positions, self.output.architecture
            check_lengths(self.tokenize, examples, *own, "--max-length")
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        for i, example in enumerate(examples):
            blank = not (alone or example.text.strip())
            blank |= example.target is not None and not example.target.strip()
            if blank:
                raise ValueError(f"{file}: example {i} is blank: remove it, or write its text")
            if self.labelled or self.embedded or example.image or example.audio:
                continue
            if not predicted(self.tokenize.encode([example])).any():
                raise ValueError(
                    f"{file}: example {i} has no token to predict in its first {self.tokenize.max_length}: "
                    "remove it, or raise --max-length"
                )


def load_tasks(
    recipe: Recipe,
    tokenize: Tokenizer,
    columns: Columns = Columns(),  # noqa: B008 - frozen
    limit: int | None = None,
    split: Split = "test",
    heads: Mapping[str, TaskHead] | None = None,
) -> tuple[list[Task], list[Task]]:
    """The experts' tasks (held in) and the held-out ones, the first `limit` examples of each.

    `columns` are the fit's; `tokenize` is the base's tokenizer; `heads` are those of all tasks, by default
    `all_heads`.

    Raises:
        ValueError: the base has no measure; `limit` is not positive; a task has no such file, or the file
            lacks a column; an example has no text, no label that is a class, or no token to predict; a
            held-out task has an expert's name.
    """
    heads = all_heads(recipe) if heads is None else heads
    metric = metric_of(recipe, heads)
    if problems := list(unusable_heads(recipe)):
        raise ValueError("\n".join(problems))
    check_option("limit", limit, int | None, "[1, inf)")
    if twice := recipe.experts.keys() & recipe.held_out.keys():
        raise ValueError(f"recipe.held_out: {sorted(twice)} are names of experts; rename these tasks")
    if metric == SIMILARITY:
        for line in unfollowed_settings(recipe.folders["base"]):
            warnings.warn(line, stacklevel=2)
    output, labelled = output_of(recipe.folders["base"]), metric not in (PERPLEXITY, SIMILARITY)
    files = TestFiles(output, labelled, columns, tokenize, limit, split, embedded=metric == SIMILARITY)
    held_in = [
        files.task(name, getattr(expert, split), heads[name]) for name, expert in recipe.experts.items()
    ]
    if split != "test":
        return held_in, []
    held_out = [files.task(name, task.test, heads[name]) for name, task in recipe.held_out.items()]
    check_measures(held_in, held_out)
    return held_in, held_out


def check_measures(held_in: Sequence[Task], held_out: Sequence[Task]) -> None:
    """Raise ValueError if embedders' tasks have different measures, or a held-out one needs an expert."""
    measures = {task.name: task.similar.measure for task in (*held_in, *held_out) if task.similar}
    if strange := [task.name for task in held_out if measures.get(task.name) == EXPERT]:
        raise ValueError(
            f"recipe.held_out: {strange} have no expert whose similarities count: give their files the "
            "column score or relevant"
        )
    if len(set(measures.values())) > 1:
        raise ValueError(
            f"the tasks have different measures, {measures}: give all test files the same of the columns "
            "score and relevant, or score them in separate recipes"
        )
