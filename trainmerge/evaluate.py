"""A run folder or a checkpoint -> a score on every task, beside what it has to be compared with.

Accuracy where the tasks have classification heads, perplexity of their test texts where they have none.

Legend: `K` experts (tasks), `B` examples, `T` tokens.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from torchmetrics.classification import MulticlassAccuracy

from trainmerge.batch import Batch
from trainmerge.checkpoints import load_model, open_checkpoint
from trainmerge.config import read_config
from trainmerge.examples import load_examples
from trainmerge.export import open_run
from trainmerge.folders import write_whole
from trainmerge.forward import Tokenize, build_classifier, forward
from trainmerge.metrics import ACCURACY, PERPLEXITY, Metric, Scores
from trainmerge.recipe import Expert, Recipe
from trainmerge.resident import Resident, load_resident
from trainmerge.run_folder import RunFolder
from trainmerge.tokenizer import Tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFAULT_LENGTH = 256  # as in Calibration
GRID = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Examples:
    """Test examples of one task; labelled, if it has a head."""

    texts: Sequence[str]
    labels: Sequence[int] = ()


def load_test(name: str, expert: Expert, limit: int) -> Examples:
    """A task's first `limit` test examples (0: all).

    Raises:
        ValueError: the task has no test file, or the file lacks `text` or, under a head, `label`.
    """
    if not expert.test:
        raise ValueError(f"{name}: scoring needs `test`, a file with a column text, and label under a `head`")
    data = load_examples(expert.test, ["text", "label"] if expert.head else ["text"])
    count = min(limit, len(data)) if limit else len(data)
    return Examples(list(data["text"][:count]), list(data["label"][:count]) if expert.head else ())


def metric_of(recipe: Recipe) -> Metric:
    """What its tasks are scored by.

    Raises:
        ValueError: some have a head and some have none.
    """
    heads = {expert.head is not None for expert in recipe.experts.values()}
    if len(heads) > 1:
        raise ValueError("some experts have a head and some have none: score them in two recipes")
    return ACCURACY if heads == {True} else PERPLEXITY


@torch.inference_mode()
def accuracy(
    predict: Callable[[Batch], torch.Tensor],
    task: int,
    examples: Examples,
    tokenize: Tokenize,
    batch_size: int = 64,
) -> float:
    """Share of right answers; texts go in order of length, so that little is padded."""
    order = sorted(range(len(examples.texts)), key=lambda i: len(examples.texts[i]))
    metric: MulticlassAccuracy | None = None
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        inputs = {name: t.to(DEVICE) for name, t in tokenize([examples.texts[i] for i in chosen]).items()}
        logits = predict(Batch(task, inputs, inputs["attention_mask"].bool(), torch.tensor(chosen)))
        metric = metric or MulticlassAccuracy(num_classes=logits.shape[-1], average="micro")
        metric.update(logits.cpu(), torch.tensor([examples.labels[i] for i in chosen]))
    assert metric is not None
    return float(metric.compute())


@torch.inference_mode()
def perplexity(
    predict: Callable[[Batch], torch.Tensor],
    task: int,
    examples: Examples,
    tokenize: Tokenize,
    tokens: int = 512,
) -> float:
    """Exp of the mean loss over every token but the first of each text, about `tokens` in a forward pass."""
    total, count = 0.0, 0
    longest = max(len(tokenize([text])["input_ids"][0]) for text in examples.texts)
    size = max(1, tokens // longest)
    for first in range(0, len(examples.texts), size):
        inputs = {k: t.to(DEVICE) for k, t in tokenize(list(examples.texts[first : first + size])).items()}
        mask = inputs["attention_mask"].bool()
        logits = predict(Batch(task, inputs, mask, torch.arange(len(mask))))
        told = mask[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1][told].float(), inputs["input_ids"][:, 1:][told], reduction="sum"
        )
        total, count = total + float(losses), count + int(told.sum())
    return math.exp(total / max(1, count))


def score_task(
    predict: Callable[[Batch], torch.Tensor], task: int, examples: Examples, tokenize: Tokenize
) -> float:
    """Accuracy of labelled examples, perplexity of others."""
    return (accuracy if examples.labels else perplexity)(predict, task, examples, tokenize)


def evaluate_run(
    run: str | Path, limit: int = 0, max_length: int = 0, grid: Sequence[float] = GRID, compare: bool = True
) -> Scores:
    """Scores of a run's merge and, to compare, of base, average, best task arithmetic and the experts.

    The best task-arithmetic coefficient is chosen on the test scores themselves: the baseline gets the
    benefit of an oracle that the learned merge does not have.
    """
    recipe, coefficients, opened = open_run(folder := RunFolder(Path(run)))
    metric_of(recipe)
    tests = [load_test(name, expert, limit) for name, expert in recipe.experts.items()]
    tokenize = Tokenizer(recipe.base, max_length or fitted_length(folder))
    resident = load_resident(
        recipe, opened, coefficients, tokenize, folder.workspace, DEVICE, examples=folder.examples()
    )
    resident.merged.materialise()

    def score(tasks: Sequence[int]) -> dict[str, float]:
        names = list(recipe.experts)
        return {names[k]: score_task(lambda b: resident(b).logits, k, tests[k], tokenize) for k in tasks}

    everything = range(len(recipe.experts))
    rows: dict[str, Callable[[], dict[str, float]]] = {"learned": lambda: score(everything)}
    if compare:
        rows = {
            **_uniform_rows(resident, grid, score),
            **rows,
            "expert": lambda: _expert_scores(resident, score),
        }
    scores: Scores = {row: scored() for row, scored in track(rows.items(), description="scoring")}
    return keep_best_arithmetic(scores, metric_of(recipe))


def fitted_length(folder: RunFolder) -> int:
    """The length at which the run's calibration texts were cut."""
    return int(json.loads(folder.manifest.read_text())["data"]["max_length"])


Score = Callable[[Sequence[int]], dict[str, float]]


def _uniform_rows(
    resident: Resident, grid: Sequence[float], score: Score
) -> dict[str, Callable[[], dict[str, float]]]:
    """The rows whose experts all have the same coefficient."""
    K = len(resident.classifiers)

    def at(coefficient: float) -> dict[str, float]:
        with resident.merged.uniform(torch.full((K,), coefficient)):
            return score(range(K))

    settings = {"base": 0.0, "average": 1 / K} | {f"task arithmetic {c}": c for c in grid}
    return {row: partial(at, coefficient) for row, coefficient in settings.items()}


def _expert_scores(resident: Resident, score: Score) -> dict[str, float]:
    """Every expert on its own task."""
    scores: dict[str, float] = {}
    for task in range(len(resident.classifiers)):
        with resident.merged.teacher(task):
            scores |= score([task])
    return scores


def keep_best_arithmetic(rows: Scores, metric: Metric) -> Scores:
    """The rows with only the best of the task-arithmetic ones, by mean."""
    arithmetic = [row for row in rows if row.startswith("task arithmetic")]
    best = metric.best(rows, arithmetic)
    return {row: scores for row, scores in rows.items() if row not in arithmetic or row == best}


def evaluate_checkpoint(
    checkpoint: str | Path, recipe: Recipe, limit: int = 0, max_length: int = DEFAULT_LENGTH
) -> Scores:
    """Scores of one checkpoint folder on a recipe's tasks; label heads are the recipe's base's."""
    tests = [load_test(name, expert, limit) for name, expert in recipe.experts.items()]
    tokenize = Tokenizer(recipe.base, max_length)
    base = load_model(open_checkpoint(recipe.base, recipe.allow_pickle), recipe.ignore).module.to(DEVICE)
    heads = [build_classifier(expert.head, base, tokenize) for expert in recipe.experts.values()]
    module = load_model(open_checkpoint(checkpoint, recipe.allow_pickle), recipe.ignore).module.to(DEVICE)
    return {
        str(checkpoint): {
            name: score_task(
                lambda batch: forward(module, batch, heads[batch.expert]).logits, task, tests[task], tokenize
            )
            for task, name in enumerate(recipe.experts)
        }
    }


def recipe_of(path: Path) -> Recipe:
    """The recipe of a run folder, an exported checkpoint, or a configuration file."""
    for file in (path / "recipe.yaml", path / "trainmerge_recipe.yaml", path):
        if file.is_file():
            return read_config(Recipe, "recipe", file)
    raise ValueError(f"{path}: no run folder, exported checkpoint or configuration file")


def write_scores(rows: Scores, metric: Metric, path: Path) -> None:
    """Scores as JSON, with mean and normalised mean a row."""
    relative = metric.normalised(rows)
    summary = {
        row: {**scores, "mean": metric.mean(scores)} | ({"normalised": relative[row]} if relative else {})
        for row, scores in rows.items()
    }
    write_whole(path, json.dumps(summary, indent=2))
