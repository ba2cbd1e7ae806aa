"""A checkpoint folder -> its scores on a recipe's tasks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from trainmerge.checkpoints import Checkpoint, OwnHead, load_model, output_of
from trainmerge.data.classifier import Classifier
from trainmerge.data.columns import Columns
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.evaluation import Evaluation
from trainmerge.evaluate.harness import HarnessTask, run_harness
from trainmerge.evaluate.measure import metric_of
from trainmerge.evaluate.own_checkpoint import narrowed, own_subject, own_tasks
from trainmerge.evaluate.runs import Heads, build_task_heads, references_from_files
from trainmerge.evaluate.score_task import score_tasks
from trainmerge.evaluate.subject import Subject
from trainmerge.evaluate.tasks import Task, load_tasks
from trainmerge.evaluate.vocabulary import Reading, reading
from trainmerge.model.embedding import read_embedding
from trainmerge.model.own_head import OwnModel, attach
from trainmerge.model.resident import DEVICE, special_ids
from trainmerge.run.heads import all_heads
from trainmerge.run.recipe import Recipe
from trainmerge.run.sources import DEFAULT_LENGTH
from trainmerge.system.hub import folder_of

PlannedHeads = Mapping[str, Classifier | OwnModel | OwnHead | None]  # by task


def evaluate_checkpoint(
    checkpoint: str | Path,
    recipe: Recipe,
    limit: int | None = None,
    max_length: int = DEFAULT_LENGTH,
    answers: int | None = None,
    harness: Sequence[HarnessTask] = (),
    columns: Columns = Columns(),  # noqa: B008 - frozen
) -> Evaluation:
    """Scores of one checkpoint folder, and of the base if the recipe has held-out tasks.

    A checkpoint with a head of its own, an `export --task` or an expert, is scored on its own task alone.
    Label heads use the recipe's base. Texts are truncated to `max_length` tokens; `text_length` gives the
    length of a run's fit, and `columns_of` its columns.

    Raises:
        ValueError: as `load_tasks`; or the checkpoint is of another kind than the recipe's base.
    """
    with reading(recipe) as words:
        return _evaluated(words, str(checkpoint), limit, max_length, answers, harness, columns)


def _evaluated(
    words: Reading,
    checkpoint: str,
    limit: int | None,
    max_length: int,
    answers: int | None,
    harness: Sequence[HarnessTask],
    columns: Columns,
) -> Evaluation:
    recipe = words.recipe
    own, place = all_heads(recipe), folder_of(checkpoint, allow_pickle=recipe.allow_pickle)
    if alone := own_tasks(place, recipe, own):
        recipe, own = narrowed(recipe, alone, place), {name: own[name] for name in alone}
    metric, tokenize = metric_of(recipe, own), Tokenizer(words.tokenizer, max_length)
    held_in, held_out = load_tasks(recipe, tokenize, columns, limit, heads=own)
    tasks = [*held_in, *held_out]
    if not alone:
        check_kind(place, recipe, tasks)
    folders = {checkpoint: place}
    if held_out or (harness and not alone):
        folders = {"base": recipe.folders["base"], **folders}
    heads = {} if alone else plan_heads(words, tasks, tokenize)
    references = {} if alone else references_from_files(recipe, tasks, tokenize)
    rows, found = {}, {}
    for row, folder in folders.items():
        if alone:
            subject = own_subject(words.open(folder).path, recipe, tasks, tokenize, answers)
        else:
            subject = load_checkpoint(words.open(folder), recipe, heads, tasks, tokenize, answers, references)
        rows[row] = score_tasks(subject, tasks)
        if harness:
            found[row] = run_harness(subject.module, words.tokenizer, harness, limit)
    names = tuple(task.name for task in held_in), tuple(task.name for task in held_out)
    return Evaluation(metric, *names, rows, found)


def check_kind(checkpoint: Path, recipe: Recipe, tasks: Sequence[Task]) -> None:
    """Raise ValueError if the checkpoint would be scored otherwise than the base.

    Tasks without a head need a model of the base's kind, and experts' own heads one of the base's class.
    """
    base, own = output_of(recipe.folders["base"]), output_of(checkpoint)
    heads = [task.name for task in tasks if isinstance(task.head, OwnHead)]
    if heads and own.architecture != base.architecture:
        raise ValueError(
            f"{checkpoint} is a {own.architecture}, and the heads of {heads} stand on the base's "
            f"{base.architecture}: score an export of the merge (without a task's head) or a run"
        )
    if all(task.head for task in tasks):
        return
    if (own.kind, own.labels) != (base.kind, base.labels):
        theirs, ours = (f"a {o.kind} ({o.architecture}, {o.labels or 'no'} classes)" for o in (own, base))
        raise ValueError(
            f"{checkpoint} is {theirs}, the recipe's base {recipe.base} is {ours}: score it on a recipe of "
            "its own kind"
        )


def plan_heads(words: Reading, tasks: Sequence[Task], tokenize: Tokenizer) -> PlannedHeads:
    """The tasks' heads; loads the base temporarily. Experts' own ones stand on each checkpoint: `over`."""
    recipe = words.recipe
    base = load_model(words.open(recipe.folders["base"]), recipe.ignore).module.to(DEVICE)
    built = build_task_heads(base, [task for task in tasks if not isinstance(task.head, OwnHead)], tokenize)
    return {**{task.name: task.head for task in tasks if isinstance(task.head, OwnHead)}, **built}


def over(heads: PlannedHeads, module: nn.Module, names: Mapping[str, str], tokenize: Tokenizer) -> Heads:
    """The heads over a model; `names` are its parameters by the tensors of the base's files."""
    special = special_ids(tokenize)
    return {
        task: attach(head, module, names, special) if isinstance(head, OwnHead) else head
        for task, head in heads.items()
    }


def load_checkpoint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    heads: PlannedHeads,
    tasks: Sequence[Task],
    tokenize: Tokenizer,
    answers: int | None = None,
    references: Mapping[str, Tensor] = {},
) -> Subject:
    """A checkpoint as a `Subject`; a sentence embedder embeds by its own folder's modules."""
    embedding = read_embedding(checkpoint) if any(task.similar for task in tasks) else None
    loaded = load_model(checkpoint, recipe.ignore)
    module = loaded.module.to(DEVICE)
    placed = over(heads, module, loaded.names, tokenize)
    return Subject(module, placed, tokenize, answers, embedding, references)
