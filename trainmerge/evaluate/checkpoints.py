"""A checkpoint folder -> its scores on a recipe's tasks."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
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
from trainmerge.evaluate.score_keys import checkpoint_key, kept_for
from trainmerge.evaluate.score_task import score_task
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
SharedHeads = Callable[[], tuple[PlannedHeads, Mapping[str, Tensor]]]


def evaluate_checkpoint(
    checkpoint: str | Path,
    recipe: Recipe,
    limit: int | None = None,
    max_length: int = DEFAULT_LENGTH,
    answers: int | None = None,
    harness: Sequence[HarnessTask] = (),
    columns: Columns = Columns(),  # noqa: B008 - frozen
    kept: str | Path | None = None,
) -> Evaluation:
    """Scores of one checkpoint folder, and of the base if the recipe has held-out tasks.

    A checkpoint with a head of its own, an `export --task` or an expert, is scored on its own task alone.
    Label heads use the recipe's base. Texts are truncated to `max_length` tokens; `text_length` gives the
    length of a run's fit, and `columns_of` its columns. `kept` is a folder of earlier scores: those of the
    same weights on the same examples are taken from it, and new ones are kept there (`kept.scores_beside`).

    Raises:
        ValueError: as `load_tasks`; or the checkpoint is of another kind than the recipe's base.
    """
    with reading(recipe) as words:
        place = None if kept is None else Path(kept)
        return _evaluated(words, str(checkpoint), limit, max_length, answers, harness, columns, place)


def _evaluated(
    words: Reading,
    checkpoint: str,
    limit: int | None,
    max_length: int,
    answers: int | None,
    harness: Sequence[HarnessTask],
    columns: Columns,
    place_of_scores: Path | None,
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
    heads = shared_heads(words, recipe, tasks, tokenize)
    kept = kept_for(place_of_scores, tasks, tokenize, words.recipe, answers)
    rows, found, taken = {}, {}, []
    for row, folder in folders.items():
        model = checkpoint_key(kept, folder, words.recipe, bool(alone))
        if known := kept.known(model, tasks):
            rows[row] = known
            taken.append(row)
            if not harness:
                continue
        if alone:
            subject = own_subject(words.open(folder).path, recipe, tasks, tokenize, answers)
        else:
            subject = load_checkpoint(words.open(folder), recipe, heads, tasks, tokenize, answers)
        rows[row] = kept.scores(model, tasks, partial(score_task, subject))
        if harness:
            found[row] = run_harness(subject.module, words.tokenizer, harness, limit)
    names = tuple(task.name for task in held_in), tuple(task.name for task in held_out)
    return Evaluation(metric, *names, rows, found, taken=tuple(taken))


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


def shared_heads(words: Reading, recipe: Recipe, tasks: Sequence[Task], tokenize: Tokenizer) -> SharedHeads:
    """The heads and the experts' similarities, made once, when the first model needs them."""
    return cache(lambda: (plan_heads(words, tasks, tokenize), references_from_files(recipe, tasks, tokenize)))


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
    heads: SharedHeads,
    tasks: Sequence[Task],
    tokenize: Tokenizer,
    answers: int | None = None,
) -> Subject:
    """A checkpoint as a `Subject`; a sentence embedder embeds by its own folder's modules."""
    planned, references = heads()  # before the model: they need the base in memory for a while
    embedding = read_embedding(checkpoint) if any(task.similar for task in tasks) else None
    loaded = load_model(checkpoint, recipe.ignore)
    module = loaded.module.to(DEVICE)
    placed = over(planned, module, loaded.names, tokenize)
    return Subject(module, placed, tokenize, answers, embedding, references)
