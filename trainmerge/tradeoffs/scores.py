"""Scores that a search can maximise: the measures of `evaluate`, the negative loss, or any callable."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from trainmerge.data.calibration import Calibration
from trainmerge.evaluate import load_tasks
from trainmerge.evaluate.runs import as_embedder, build_task_heads
from trainmerge.evaluate.score_task import score_task
from trainmerge.evaluate.subject import Subject, TaskScore
from trainmerge.fitting.calibration_loss import batches, calibration_loss
from trainmerge.fitting.module import MergeModule
from trainmerge.run.heads import all_heads
from trainmerge.run.scores import PERPLEXITY

Score = Callable[[], float]  # of the model's current weights; higher is better
SIGNS = {
    "accuracy": 1, "macro_f1": 1, "f1": 1, "exact_match": 1, "pearson": 1, "spearman": 1,
    "expert_spearman": 1, "ndcg_at_10": 1,
    "calibration_error": -1, "perplexity": -1, "bits_per_byte": -1, "mse": -1,
}  # fmt: skip


def make_score(
    name: str, options: Mapping[str, Any], module: MergeModule, data: Calibration, limit: int | None = None
) -> Score:
    """A measure of `evaluate`, averaged over the experts' `validation` files; `loss`; or an import path.

    `loss` is the objective over the calibration examples, which needs no labels. A path names a function
    `model -> float`, higher is better, or a class whose instances, created with `options`, are such
    functions. The model is a transformers model with the merged weights.

    Raises:
        ValueError: no such score, or an expert has no validation file.
    """
    if name == "loss":
        return lambda: -calibration_loss(module, data)
    if "." in name:
        function = imported(name, options)
        model = module.resident.merged.module
        return lambda: float(function(model))
    if name not in SIGNS:
        raise ValueError(
            f"no score {name!r}: one of {', '.join(['loss', *SIGNS])}, or package.module.callable"
        )
    return _measured(name, module, data, limit)


def make_example_scores(
    name: str, module: MergeModule, data: Calibration, limit: int | None = None
) -> Callable[[], list[float]]:
    """A score of 0 or more for each example: `accuracy`, or without labels `loss`, which is exp(-loss).

    `accuracy` is that of the experts' `validation` files. One process.

    Raises:
        ValueError: another score; an expert has no validation file.
    """
    if name == "loss":
        return lambda: _closeness(module, data)
    if name != "accuracy":
        raise ValueError(f"niches need a score per example: accuracy or loss, not {name!r}")
    score = _scorer(module, data, limit)

    def right() -> list[float]:
        found = score()
        if absent := [task for task, own in found.items() if name not in own.measures]:
            raise ValueError(f"--score accuracy: the tasks {absent} lack it")
        return [float(value) for own in found.values() for value in own.outcomes[:, 0]]

    return right


@torch.no_grad()
def _closeness(module: MergeModule, data: Calibration) -> list[float]:
    losses = [module.losses(batch).double() for batch in batches(module.resident, data)]
    found: list[float] = torch.cat(losses).neg().exp().tolist()
    return found


def imported(path: str, options: Mapping[str, Any]) -> Callable[[nn.Module], float]:
    """The callable of an import path; a class is instantiated with `options`.

    Raises:
        ValueError: it cannot be imported or called, or there are options but no class.
    """
    place, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(place), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--score {path}: {error}") from error
    made = found(**options) if isinstance(found, type) else found
    if not callable(made) or (options and made is found):
        raise ValueError(f"--score {path}: give a function, or a class with its options")
    return made  # type: ignore[no-any-return]


def _scorer(module: MergeModule, data: Calibration, limit: int | None) -> Callable[[], dict[str, TaskScore]]:
    """Scores of the module's current weights on the experts' validation files."""
    own = all_heads(module.recipe, module.opened)
    tasks, _ = load_tasks(module.recipe, data.tokenize, data.columns, limit, "validation", own)
    resident = module.resident
    model = resident.merged.module
    with resident.merged.uniform(module.start.new_zeros(len(tasks)), everywhere=True):
        heads = build_task_heads(model, tasks, data.tokenize, resident.merged.names)
    subject = as_embedder(Subject(model, heads, data.tokenize), resident, module.opened.base, tasks)

    return lambda: {task.name: score_task(subject, task) for task in tasks}


def _measured(name: str, module: MergeModule, data: Calibration, limit: int | None) -> Score:
    scorer = _scorer(module, data, limit)

    def score() -> float:
        found = {task: own.measures for task, own in scorer().items()}
        if absent := [task for task, measures in found.items() if name not in measures]:
            raise ValueError(
                f"--score {name}: the tasks {absent} lack it; they have {list(found[absent[0]])}"
            )
        values = {task: measures[name] for task, measures in found.items()}
        mean = PERPLEXITY.mean(values) if name == "perplexity" else sum(values.values()) / len(values)
        return SIGNS[name] * mean

    return score
