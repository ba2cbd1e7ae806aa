"""A run folder -> scores of its merge, and of base, average, task arithmetic and the experts.

Legend: `K` experts (tasks).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from trainmerge.checkpoints import Checkpoint, LoadedModel
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.data.classifier import Classifier
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.controls import score_controls
from trainmerge.evaluate.evaluation import Evaluation
from trainmerge.evaluate.harness import HarnessTask
from trainmerge.evaluate.kept import KeptScores, scores_beside
from trainmerge.evaluate.measure import metric_of
from trainmerge.evaluate.pairs import EXPERT
from trainmerge.evaluate.rows import Rows, uniform_rows
from trainmerge.evaluate.score_keys import run_keys, task_keys
from trainmerge.evaluate.similarity import cosines, embed_texts
from trainmerge.evaluate.subject import Subject
from trainmerge.evaluate.tasks import Task, load_tasks
from trainmerge.model.embedding import read_embedding
from trainmerge.model.own_head import OwnModel
from trainmerge.model.resident import DEVICE, Placement, Resident, load_resident, preprocess
from trainmerge.model.resident import build_heads as build_resident_heads
from trainmerge.model.uniform_buffers import uniform_buffers
from trainmerge.run.folder import RunFolder
from trainmerge.run.heads import all_heads
from trainmerge.run.merge_buffers import REESTIMATE, merge_buffers
from trainmerge.run.open_run import open_run
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.run.sources import columns_of, text_length
from trainmerge.system import distributed
from trainmerge.system.console import progress
from trainmerge.system.ranges import check_option

GRID = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
Heads = dict[str, Classifier | OwnModel | None]


def evaluate_run(
    run: str | Path,
    limit: int | None = None,
    max_length: int | None = None,
    grid: Sequence[float] = GRID,
    compare: bool = True,
    answers: int | None = None,
    harness: Sequence[HarnessTask] = (),
    controls: bool = False,
    reuse: bool = True,
) -> Evaluation:
    """Scores of a run's merge and of the baselines: base, average, best task arithmetic and the experts.

    The best task-arithmetic coefficient is an oracle's: it is chosen on the test scores themselves.

    Args:
        run: The run folder.
        limit: Score the first so many examples of each task; by default all.
        max_length: Truncate texts to this many tokens; by default as in the run's fit.
        grid: The task-arithmetic coefficients.
        compare: Score the baselines too; the base is scored anyway if there are held-out tasks.
        answers: Maximal tokens of an answer to a test file's column `prompt`; by default prompts are skipped.
        harness: lm-evaluation-harness tasks, as held-out ones.
        controls: Score random task vectors and shuffled coefficients (`model.controls`) and a fresh LoRA too.
        reuse: Take scores of the same weights on the same examples from earlier evaluations of runs beside
            this one, and keep the new ones for later (`kept`). Controls and `harness` are always anew, and so
            is all of a recipe with `buffers: reestimate`.
    """
    check_option("grid", grid, Sequence[float])
    recipe, coefficients, opened = open_run(folder := RunFolder(Path(run)))
    words = recipe.tokenizer_folder(folder.workspace)
    tokenize = Tokenizer(words, text_length(folder.path, max_length))
    own = all_heads(recipe, opened)
    held_in, held_out = load_tasks(recipe, tokenize, columns_of(folder.path), limit, heads=own)
    tasks = [*held_in, *held_out]
    resident, subject = load_subject(recipe, coefficients, opened, tokenize, folder, tasks, answers)
    uniform = uniform_rows(len(held_in), grid, compare, bool(held_out or harness))
    buffers = uniform_buffers(folder, recipe, opened, resident)
    kept, models = KeptScores(), dict[str, str]()
    if reuse and recipe.buffers != REESTIMATE:
        of = opened.checksums.__getitem__
        kept = KeptScores(scores_beside(folder.path), task_keys(tasks, tokenize, recipe, of, answers))
        kept.watch(opened)
        models = run_keys(folder, recipe, opened, coefficients, uniform)
    rows = Rows(resident, subject, held_in, held_out, uniform, harness, limit, buffers, kept, models)
    for row in progress(rows.in_order(compare), "scoring", disable=distributed.rank() > 0):
        rows.score(row)
    if controls:
        from trainmerge.evaluate.fresh_adapter import fresh_adapter  # imports pytorch_lightning

        fresh = fresh_adapter(folder, recipe, opened, resident)
        rows.scored |= score_controls(resident.merged, subject, held_in, fresh)
    return rows.result(metric_of(recipe, own))


def load_subject(
    recipe: Recipe,
    coefficients: Coefficients,
    opened: Opened,
    tokenize: Tokenizer,
    folder: RunFolder,
    tasks: Sequence[Task],
    answers: int | None = None,
) -> tuple[Resident, Subject]:
    """The run's merge in memory, materialised, and as a `Subject`."""
    check_option("answers", answers, int | None, "[0, inf)")
    vectors = preprocess(opened, recipe.preprocess, folder.workspace, folder.examples())
    resident = load_resident(recipe, opened, coefficients, tokenize, Placement(DEVICE)).merging(vectors)
    merged = resident.merged
    heads = build_task_heads(merged.module, tasks, tokenize, merged.names)  # while it has the base's weights
    merged.materialise()
    resident.hold(merge_buffers(folder, recipe, opened, coefficients))
    subject = Subject(merged.module, heads, tokenize, answers)
    return resident, as_embedder(subject, resident, opened.base, tasks)


def as_embedder(subject: Subject, resident: Resident, base: Checkpoint, tasks: Sequence[Task]) -> Subject:
    """The subject with its embedding, and the similarities of the experts that tasks without labels need.

    The k-th task is the k-th expert's. Unchanged if the tasks are of no embedder.
    """
    if not any(task.similar for task in tasks):
        return subject
    embedding, found = read_embedding(base), {}
    for k, task in enumerate(tasks):
        if task.similar is not None and task.similar.measure == EXPERT:
            texts = subject.texts(task.name, [Example(text) for text in task.similar.texts])
            with resident.merged.teacher(k) as expert:
                rows = embed_texts(expert, embedding, texts)
            found[task.name] = cosines(rows, task.similar)
    return replace(subject, embedding=embedding, references=found)


def references_from_files(recipe: Recipe, tasks: Sequence[Task], tokenize: Tokenizer) -> Mapping[str, Tensor]:
    """Task -> its expert's similarities [P], from the recipe's own files; empty if no task needs them."""
    if not any(task.similar is not None and task.similar.measure == EXPERT for task in tasks):
        return {}
    opened = recipe.open(aligned=False)  # the same functions
    coefficients = Coefficients(tuple(recipe.experts), opened.layout, 0.0)
    resident = load_resident(recipe, opened, coefficients, tokenize, Placement(DEVICE))
    return as_embedder(Subject(resident.merged.module, {}, tokenize), resident, opened.base, tasks).references


def build_task_heads(
    base: nn.Module, tasks: Sequence[Task], tokenize: Tokenizer, names: Mapping[str, str] | None = None
) -> Heads:
    """Every task's head; `base` must have the base's weights, which embed label texts.

    `names` are the parameters of `base` by the tensors of the base's files, for experts' own heads.
    """
    loaded = LoadedModel(base, names or {})
    heads = build_resident_heads({task.name: task.head for task in tasks}, loaded, None, tokenize)
    return {task.name: head for task, head in zip(tasks, heads, strict=True)}
