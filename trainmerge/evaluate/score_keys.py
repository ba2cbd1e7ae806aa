"""Digests of what decides scores: of a task and the way it is scored, and of a run's or a checkpoint's model.

Contents are digested, not paths or names: a change of any of them gives another digest.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainmerge.checkpoints import OwnHead, module_folders
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.data.examples import contents
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.kept import KeptScores
from trainmerge.evaluate.pairs import EXPERT as BY_EXPERTS
from trainmerge.evaluate.rows import ARITHMETIC, EXPERT, LEARNED
from trainmerge.evaluate.tasks import Task
from trainmerge.model.resident import DEVICE
from trainmerge.run.folder import RunFolder
from trainmerge.run.heads import TaskHead
from trainmerge.run.manifest import versions
from trainmerge.run.merge_buffers import REESTIMATE
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.system.hub import SIDE
from trainmerge.system.safetensors_file import flat_bytes, sha256
from trainmerge.system.workspace import digest

# Packages beside those of a manifest; the last two, of processors of pictures and sounds, may be absent
MORE = ("tokenizers", "torchmetrics", "numpy", "pillow", "torchvision", "torchaudio")
Checksums = Callable[[str], Mapping[str, str]]  # "base" or an expert -> its `fingerprint`


def task_keys(
    tasks: Sequence[Task],
    tokenize: Tokenizer,
    recipe: Recipe,
    checksums: Checksums,
    answers: int | None = None,
) -> dict[str, str]:
    """Task -> a digest of its examples, head, tokenizer, lengths, precision, device and versions.

    A task has none if its head is somebody else's, whose source may change.

    Args:
        tasks: The tasks.
        tokenize: What reads them.
        recipe: Its base embeds the texts of label heads; its experts, texts that have no labels.
        checksums: The fingerprints of its base and experts.
        answers: Maximal tokens of an answer.
    """
    embed = [task.similar is not None and task.similar.measure == BY_EXPERTS for task in tasks]
    sides = ["base"] if recipe.choice.is_default and not any(embed) else ["base", *recipe.experts]
    files = [[side, checksums(side)] for side in sides]
    how = [_numerics(), *_read_as(recipe), tokenize.max_length, _side_files(Path(tokenize.path)), files]
    known = [task for task in tasks if task.head is None or _is_ours(task.head)]
    return {task.name: _digest([how, *_content(task, answers)]) for task in known}


def run_keys(
    folder: RunFolder,
    recipe: Recipe,
    opened: Opened,
    coefficients: Coefficients,
    uniform: Mapping[str, float],
) -> dict[str, str]:
    """Row -> a digest of its weights: `learned`, each of `uniform`, and an expert's by its name.

    A row has none if a method that makes it is somebody else's, whose source may change.

    The experts' own task vectors make all rows but the learned one, which is after `recipe.preprocess`.
    """
    if not all(map(_is_ours, recipe.align)):
        return {}
    terms = {n: [type(term).__name__ for term in own.terms] for n, own in opened.task_vectors.deltas.items()}
    rule = [recipe.buffers, [expert.weight for expert in recipe.experts.values()]]
    fitted = folder.read_manifest().get("versions")  # of what is in the workspace
    shared = [opened.identity(), terms, rule, fitted, *_read_as(recipe), _side_files(opened.base.path)]
    made = [[repr(method) for method in recipe.preprocess], folder.examples(), _files(folder.workspace)]
    layout, values = coefficients.layout, _bytes(coefficients().detach().float())
    rows: dict[str, Any] = {
        row: ["uniform", row.startswith(ARITHMETIC), value, [*layout.groups]]
        for row, value in uniform.items()
    }
    rows |= {f"{EXPERT} {name}": [EXPERT, name] for name in recipe.experts}
    if all(map(_is_ours, recipe.preprocess)):
        rows[LEARNED] = [LEARNED, made, layout.identity(), values]
    return {row: _digest([shared, own]) for row, own in rows.items()}


def kept_for(
    place: Path | None, tasks: Sequence[Task], tokenize: Tokenizer, recipe: Recipe, answers: int | None = None
) -> KeptScores:
    """The scores in a folder, for tasks with the heads of a recipe's files."""
    kept = KeptScores(place)
    if place is not None:
        files = _checksums(kept, recipe)
        kept.tasks = task_keys(tasks, tokenize, recipe, files, answers)
    return kept


def checkpoint_key(kept: KeptScores, folder: Path, recipe: Recipe, alone: bool) -> str | None:
    """A digest of a checkpoint's weights, configuration and modules; `alone`: with the head in its files."""
    if kept.folder is None:
        return None
    sides = [] if recipe.choice.is_default else ["base", *recipe.experts]  # whose tokens have rows
    moved = [_checksums(kept, recipe)(side) for side in sides]
    return _digest([kept.checksums(folder), alone, moved, *_read_as(recipe), _side_files(folder)])


def merge_key(
    kept: KeptScores, folder: RunFolder, recipe: Recipe, opened: Opened, coefficients: Coefficients
) -> str | None:
    """A digest of a run's merge, whose files are watched; None if its buffers are measured."""
    if kept.folder is None or recipe.buffers == REESTIMATE:
        return None
    kept.watch(opened)
    return run_keys(folder, recipe, opened, coefficients, {}).get(LEARNED)


def _is_ours(method: object) -> bool:
    """Whether a method is this package's, whose source is digested."""
    return type(method).__module__.partition(".")[0] == __name__.partition(".")[0]


def _files(workspace: Path) -> list[Any]:
    """Names, sizes and times of the preprocessed task vectors that a fit has left."""
    found = sorted(workspace.glob("task_vectors-*")) if workspace.is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in found]


def _checksums(kept: KeptScores, recipe: Recipe) -> Checksums:
    return lambda side: kept.checksums(recipe.folders[side])


def _read_as(recipe: Recipe) -> list[Any]:
    """How a recipe reads files."""
    return [repr(recipe.choice), recipe.vocabulary, [*recipe.ignore], recipe.allow_pickle, repr(recipe.align)]


def _content(task: Task, answers: int | None) -> Iterator[Any]:
    """What a task's file and head say, as JSON data."""
    yield [task.kind, [contents(example) for example in task.examples], [*task.labels]]
    yield [answers, [*task.prompts]] if answers and task.prompts else []
    yield _head(task.head)
    if (similar := task.similar) is not None:
        tensors = similar.pairs, similar.scores, similar.documents
        yield [[*similar.texts], *(None if tensor is None else tensor.tolist() for tensor in tensors)]


def _head(head: TaskHead) -> Any:
    if not isinstance(head, OwnHead):
        return head and head.identity()
    return [head.identity(), sorted(head.shared.items()), [[n, _bytes(own)] for n, own in head.tensors()]]


def _side_files(folder: Path) -> dict[str, str]:
    """SHA-256 of a folder's configurations and tokenizer, and of its modules after the model."""
    places = ["", *sorted(place.as_posix() for place in module_folders(folder))]
    found = {file for place in places for kind in SIDE for file in (folder / place).glob(kind)}
    return {str(file.relative_to(folder)): sha256(file) for file in sorted(found) if file.is_file()}


def _numerics() -> list[Any]:
    """What the forwards' last bits depend on, but for the numbers of threads and processes."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else torch.backends.cpu.get_cpu_capability()
    cast = str(torch.get_autocast_dtype(DEVICE)) if torch.is_autocast_enabled(DEVICE) else None
    kernels = os.environ.get("TRAINMERGE_KERNELS")  # the order of a merge's sums
    widths = torch.get_float32_matmul_precision(), str(torch.get_default_dtype())
    return [kernels, name, cast, *widths, _versions()]


@cache
def _versions() -> dict[str, Any]:
    """Versions of packages, and a digest of this one's source: a change of it may change scores."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    more = {name: [found.version for found in distributions(name=name)] for name in MORE}
    return versions() | more | {"code": code.hexdigest()}


def _bytes(tensor: Tensor) -> list[Any]:
    """A tensor's dtype, shape and SHA-256."""
    plain = flat_bytes(tensor.cpu()).numpy()
    return [str(tensor.dtype), [*tensor.shape], hashlib.sha256(plain.data).hexdigest()]


def _digest(parts: Any) -> str:
    return digest(json.dumps(parts, sort_keys=True), length=64)
